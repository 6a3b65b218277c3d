"""Trackers: files of TensorBoard, W&B and MLflow that show a training."""
