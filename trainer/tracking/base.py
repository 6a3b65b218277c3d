"""The contract of a tracker. A tracker writes the values of one training for a viewing tool."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

Scalar = str | int | float | bool


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedRun:
    """The run that a tracker shows."""

    name: str
    key: str
    """Name of the run in a store that several warehouses may share; a resumed run keeps it."""
    folder: Path
    """Folder of the run."""
    shared: Path
    """Folder of the warehouse for a store that holds all runs."""
    settings: Mapping[str, Scalar]
    """Model, dataset, feature tables and all settings, by name."""


class Tracker(ABC):
    """A writer for one tool. Everything stays on this machine unless the user asks for more.

    The methods may raise any exception: the training goes on without the tracker.

    Args:
        run: The run, whose settings are written at once. A resumed run continues its values.
    """

    @abstractmethod
    def __init__(self, run: TrackedRun) -> None: ...

    @property
    @abstractmethod
    def view(self) -> str:
        """A command that shows the values, or the folder that holds them."""

    @abstractmethod
    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        """Write the values of one epoch.

        Args:
            epoch: Number of the epoch, from 1.
            values: Name such as ``train/loss``, ``rate/lr`` or ``validation/filtered/HR@10`` to
                value.
        """

    @abstractmethod
    def finish(self, table: Mapping[str, float], *, is_finished: bool) -> None:
        """Write the final table and close the files.

        Args:
            table: Name to value: those of the best epoch, and figures of the training. Empty if
                the training failed.
            is_finished: False if the training was interrupted or failed.
        """


def markdown_table(values: Mapping[str, Scalar]) -> str:
    """Return a table of names and values in Markdown.

    Examples:
        >>> print(markdown_table({"lr": 0.1}))
        | name | value |
        |---|---|
        | lr | 0.1 |
    """
    lines = [f"| {name} | {value} |" for name, value in values.items()]
    return "\n".join(["| name | value |", "|---|---|", *lines])
