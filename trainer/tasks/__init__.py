"""Tasks: what a training does in an epoch, one file per task."""
