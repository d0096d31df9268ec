"""The models: attention at the heart, the encoder and decoder of each family around it, and `Seq2Seq` above them."""
