"""The parts of the command: what a part gets, and the list of all parts."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

Report = Callable[[str, Any], None]
"""Called with the name and the value of each figure as soon as it is measured."""


class Skip(Exception):  # noqa: N818
    """Raised by a part that cannot run on this machine. The message names what is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """The machine and the sizes that a part measures."""

    device: str
    """``cuda`` or ``cpu``."""
    small: bool
    """True for tiny sizes, which show that the code runs."""
    seconds: float
    """Seconds after which a part starts no further measurement."""
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float:
        """Seconds until the part must start no further measurement; at least 0."""
        return max(0.0, self.seconds - (time.monotonic() - self.started))

    def size(self, full: int, small: int) -> int:
        """Return the full or the small size."""
        return small if self.small else full


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the command."""

    module: str
    """Module of ``tests.gpu`` whose function ``run(setup, report)`` measures."""
    share: int
    """Share of the time. A part inherits the time that earlier parts have left."""
    summary: str

    def run(self, setup: Setup, report: Report) -> None:
        """Import the module and measure."""
        import_module(f"tests.gpu.{self.module}").run(setup, report)


PARTS = {
    "tests": Part("marked_tests", 60, "the tests with the marker gpu"),
    "agreement": Part("agreement", 50, "loss and gradients of each model, CPU against GPU"),
    "extraction": Part("extraction", 100, "images a second of ViT-B/32 and ViT-L/14"),
    "steps": Part("steps", 90, "steps a second and the idle share of the GPU"),
    "contrastive": Part("contrastive", 60, "the in-batch operator against the naive form"),
    "pretraining": Part("pretraining", 80, "MMSRec's pre-training on random pairs"),
    "ranking": Part("ranking", 40, "full ranking and search"),
    "syncs": Part("syncs", 40, "waits for the device in a training step"),
}
