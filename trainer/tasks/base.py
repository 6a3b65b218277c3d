"""The base class of tasks: the batches, the loss and the validation of a training.

The training loop uses a task, and the task uses a recommender.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

from torch import Tensor

from features.warehouse import Warehouse
from trainer.config import Settings, TrainConfig
from trainer.data.batches import ItemFeatures, Shard, TrainingData
from trainer.models.base import Recommender

B = TypeVar("B")


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """The result of one validation."""

    metrics: dict[tuple[str, str], float]
    """(``filtered``, ``kept`` or a direction of retrieval; metric) to value."""
    users: int
    """Number of users, or of queries, that the values are means over."""
    monitored: float
    """The value that decides early stopping and the best checkpoint."""
    shown: dict[str, float]
    """Values for the live display, by name."""


class Task(ABC, Generic[B]):
    """A recommender with the data that it learns from."""

    unit: ClassVar[str]
    """Unit of a batch, for the live display: ``windows`` or ``items``."""
    settings_class: ClassVar[type[Settings] | None] = None
    """Dataclass of the settings of the task; ``None`` without settings."""
    pools: Mapping[str, Tensor] = {}
    """Split to its held-out items (K,); empty if the task holds out interactions."""
    training_pairs: Tensor | None = None
    """(P,) training items that have vision and text; ``None`` if the task does not align them."""

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
            UserError: There are too few data to learn from or to validate on.
        """

    def features_to_fit(self, features: ItemFeatures) -> ItemFeatures:
        """Return the features that the buffers of the model are fitted on; by default all features.

        Args:
            features: Features of the whole catalogue.
        """
        return features

    @abstractmethod
    def epoch(
        self, config: TrainConfig, epoch: int, *, skip: int, shard: Shard
    ) -> tuple[int, Iterator[B]]:
        """Return the batches of an epoch. They depend only on the seed and the epoch.

        Args:
            config: Settings of the loop: batch size and seed.
            epoch: Number of the epoch, from 0.
            skip: Number of batches at the start to leave out: a resumed run was trained on them.
            shard: The part of each batch that this process takes.

        Returns:
            The number of batches including the skipped ones, and the batches after these.
        """

    @abstractmethod
    def size(self, batch: B) -> int:
        """Return the number of units of a batch."""

    @abstractmethod
    def loss(self, batch: B) -> dict[str, Tensor]:
        """Return scalars by name. ``loss`` is minimised; the others are reported."""

    @abstractmethod
    def split(self, config: TrainConfig) -> str:
        """Return a description of the data that :meth:`validate` uses."""

    def validate(self, config: TrainConfig) -> Validation:
        """Measure the model on validation data: neither training data nor the test split.

        Raises:
            UserError: A vector is not finite.
        """
        return self.join_measures(config, [self.measure(config, Shard())])

    @abstractmethod
    def measure(self, config: TrainConfig, shard: Shard) -> Any:
        """Measure the model on a share of the validation data, without the other processes.

        Args:
            config: Settings of the loop.
            shard: The process that measures, and the number of processes.

        Returns:
            A value that :mod:`pickle` can write.

        Raises:
            UserError: A vector is not finite.
        """

    @abstractmethod
    def join_measures(self, config: TrainConfig, measures: Sequence[Any]) -> Validation:
        """Return the result of a validation.

        Args:
            config: Settings of the loop.
            measures: The result of :meth:`measure` of each process, in their order.
        """
