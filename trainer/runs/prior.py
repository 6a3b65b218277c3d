"""The prior of a run: chosen when the training has ended, and added when the run is opened."""

import math
from dataclasses import asdict
from pathlib import Path

from features.atomic_files import read_errors
from features.documents import read_json, write_json
from trainer.data.batches import TrainingData
from trainer.evaluation.transition_prior import PriorChoice, TransitionPrior
from trainer.models.base import Recommender
from trainer.runs.folder import PRIOR

_REMEDY = "remove it, and choose the prior again: mmrec train --resume --run NAME"


def write_prior(folder: Path, choice: PriorChoice) -> None:
    """Write the prior that was chosen for a run into its folder."""
    write_json(folder / PRIOR, asdict(choice))


def read_prior(folder: Path) -> PriorChoice | None:
    """Return the prior that was chosen for a run; ``None`` if there is none.

    Raises:
        UserError: The file is damaged.
    """
    path = folder / PRIOR
    if not path.exists():
        return None
    document = read_json(path, _REMEDY)
    with read_errors(path, _REMEDY):
        choice = PriorChoice(**document)
        is_valid = 0 <= choice.weight < math.inf and 0 < choice.eps < math.inf
        if not (is_valid and math.isfinite(choice.bias)):
            raise ValueError(f"weight {choice.weight}, eps {choice.eps}, bias {choice.bias}")
        return choice


def add_prior(folder: Path, model: Recommender, data: TrainingData) -> None:
    """Add the prior of a run to its model; the transitions are counted in the training data."""
    choice = read_prior(folder)
    if choice is not None and (choice.weight or choice.bias):
        model.prior = TransitionPrior.of(
            data,
            weight=choice.weight,
            eps=choice.eps,
            bias=choice.bias,
            scale=model.settings.scale,
        )
