"""The contract of a task: what a training does in an epoch, and how it is validated.

The loop uses tasks only, and a task uses one recommender.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

from torch import Tensor

from features.warehouse import Warehouse
from trainer.config import Settings, TrainConfig
from trainer.data.batches import Shard, TrainingData
from trainer.models.base import Recommender

B = TypeVar("B")


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """The result of one validation."""

    metrics: dict[tuple[str, str], float]
    """(``filtered`` | ``kept`` | a direction of retrieval, metric) to value."""
    users: int
    """Number of users, or of queries, that the values are means over."""
    monitored: float
    """The value that decides early stopping and the best checkpoint."""
    shown: dict[str, float]
    """The values of the live line, by name."""


class Task(ABC, Generic[B]):
    """A recommender with the data that it learns from."""

    unit: ClassVar[str]
    """What a batch holds, for the live line: windows or items."""
    settings_class: ClassVar[type[Settings] | None] = None
    """Dataclass of the task's own settings, if there are any."""
    pools: Mapping[str, Tensor] = {}
    """Split to held-out items (K,), for tasks that hold out items instead of interactions."""

    def __init__(self, model: Recommender) -> None:
        self.model = model

    @classmethod
    @abstractmethod
    def build(
        cls,
        model: Recommender,
        data: TrainingData,
        warehouse: Warehouse,
        datasets: Sequence[str],
        settings: Any,
    ) -> Self:
        """Create the task for the data of one or more datasets.

        Raises:
            UserError: There is too little to learn from.
        """

    @abstractmethod
    def epoch(
        self, config: TrainConfig, epoch: int, *, skip: int, shard: Shard
    ) -> tuple[int, Iterator[B]]:
        """Return the batches of an epoch, a function of seed and epoch alone.

        Args:
            config: Settings of the loop: batch size and seed.
            epoch: Number of the epoch, from 0.
            skip: Number of first batches to leave out, because a resumed run has had them.
            shard: The part of each batch that this process takes.

        Returns:
            The number of batches including the skipped ones, and the batches after these.
        """

    @abstractmethod
    def size(self, batch: B) -> int:
        """Return the number of units of a batch."""

    @abstractmethod
    def loss(self, batch: B) -> dict[str, Tensor]:
        """Return named scalars; ``loss`` is minimised."""

    @abstractmethod
    def split(self, config: TrainConfig) -> str:
        """Return the data that :meth:`validate` uses, in words."""

    @abstractmethod
    def validate(self, config: TrainConfig) -> Validation:
        """Measure the model on data that training never sees; never on the test split.

        Raises:
            UserError: The vectors are not finite.
        """
