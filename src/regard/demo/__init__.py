"""The demo: the three stages of sequence-to-sequence learning, trained side by side on real data in minutes."""
