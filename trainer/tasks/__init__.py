"""Tasks: batches, loss and validation of a training, one file per task."""
