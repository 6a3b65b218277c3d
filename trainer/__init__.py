"""Stage 2: recommenders, objectives, the training loop, checkpoints and the evaluation of a run."""
