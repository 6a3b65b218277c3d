"""Evaluation: encode the catalogue and the users of a split, and measure the ranks."""
