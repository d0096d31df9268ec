"""Search: from a model's probabilities to an output."""
