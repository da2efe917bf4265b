"""Data sets for training: read once, checked, and augmented a batch at a time."""
