"""Training data: batches, windows, negative samples and feature tables."""
