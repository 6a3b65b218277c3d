"""``mmrec train``."""

from cli.options import DatasetOption
from cli.training_options import training_command

train = training_command(
    "Train a recommender on interactions and features; Ctrl-C keeps all and ends with 130.",
    DatasetOption,
    is_pretraining=False,
)
