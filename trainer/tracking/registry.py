"""Registry of the trackers. A new tracker is one file, and one line here.

This module imports no tracker, and not torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from features.errors import UserError
from features.extras import require_extra
from features.registry import Registry
from trainer.tracking.base import Tracker


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackerEntry:
    """The location of the class of a tracker, and the package that it needs."""

    path: str
    """``package.module:Class``, imported by :meth:`load`."""
    module: str
    """Name of the needed package in Python."""
    distribution: str
    """Name of the needed package in the package index."""

    def load(self) -> type[Tracker]:
        """Import the class of the tracker, and with it the package."""
        module, _, name = self.path.partition(":")
        tracker: type[Tracker] = getattr(import_module(module), name)
        return tracker


TRACKERS: Registry[TrackerEntry] = Registry(
    "tracker",
    {
        "tensorboard": TrackerEntry(
            path="trainer.tracking.tensorboard:TensorBoard",
            module="tensorboard",
            distribution="tensorboard",
        ),
        "wandb": TrackerEntry(
            path="trainer.tracking.wandb:WeightsAndBiases", module="wandb", distribution="wandb"
        ),
        "mlflow": TrackerEntry(
            path="trainer.tracking.mlflow:MLflow", module="mlflow", distribution="mlflow-skinny"
        ),
    },
)
"""Name of ``--track`` to entry. The extra that installs the package has the same name."""


def check_trackers(names: Sequence[str]) -> None:
    """Check the names that a user gives, before anything is trained.

    Raises:
        UserError: A name is unknown or given twice, or its package is not installed.
    """
    for name in names:
        entry = TRACKERS.find(name)
        if list(names).count(name) > 1:
            raise UserError(f"--track gives {name!r} twice; give it once")
        require_extra(f"--track {name}", entry.module, entry.distribution, name)
