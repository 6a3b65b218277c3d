"""What a training does in an epoch: its batches, their loss, and its validation.

The loop knows tasks, and a task knows one recommender. The task of stage 2 is here: the next item;
pre-training has one more, :mod:`trainer.tasks.alignment`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from features.dataset import Dataset
from features.errors import UserError
from features.splits import MIN_EVALUATED
from retrieval.metrics import per_user
from retrieval.ranking import rank
from trainer.config import TrainConfig
from trainer.data.batches import Batch, Shard, TrainingData
from trainer.evaluation.encode import encode, seen_by, targets_of
from trainer.models.base import Recommender

B = TypeVar("B")


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """What one validation found."""

    metrics: dict[tuple[str, str], float]
    """(``filtered`` | ``kept`` | a direction of retrieval, metric) -> value."""
    users: int
    """Users, or queries, that the values are means over."""
    monitored: float
    """What early stopping goes by."""
    shown: dict[str, float]
    """The values for the live line, by name."""


class Task(ABC, Generic[B]):
    """A recommender with what it learns from."""

    unit: str
    """What a batch holds, for the live line."""

    def __init__(self, model: Recommender) -> None:
        self.model = model

    @abstractmethod
    def epoch(
        self, config: TrainConfig, epoch: int, *, skip: int, shard: Shard
    ) -> tuple[int, Iterator[B]]:
        """The batches of an epoch, a function of seed and epoch alone.

        Args:
            config: Says batch size and seed.
            epoch: From 0.
            skip: Batches at the beginning that a resumed run has had already.
            shard: Which part of each batch this process takes.

        Returns:
            The number of batches, the skipped ones included, and the batches after these.
        """

    @abstractmethod
    def size(self, batch: B) -> int:
        """How many units a batch holds."""

    @abstractmethod
    def loss(self, batch: B) -> dict[str, Tensor]:
        """Named scalars; ``loss`` is minimised."""

    @abstractmethod
    def split(self, config: TrainConfig) -> str:
        """What :meth:`validate` looks at, for reports."""

    @abstractmethod
    def validate(self, config: TrainConfig) -> Validation:
        """Measure the model on what training never sees; test is not looked at.

        Raises:
            UserError: The vectors are not finite.
        """


class NextItem(Task[Batch]):
    """Stage 2: windows of the training histories; validation ranks each user's held-out item."""

    unit = "windows"

    def __init__(self, model: Recommender, data: TrainingData) -> None:
        super().__init__(model)
        self.data = data

    def epoch(
        self, config: TrainConfig, epoch: int, *, skip: int, shard: Shard
    ) -> tuple[int, Iterator[Batch]]:
        """Windows as the recommender plans them."""
        return self.data.epoch(
            self.model.window_sampling,
            batch_size=config.batch_size,
            seed=config.seed,
            epoch=epoch,
            skip=skip,
            shard=shard,
        )

    def size(self, batch: Batch) -> int:
        """Windows."""
        return len(batch.sequences.lengths_B)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The recommender's own."""
        return self.model.loss(batch)

    def split(self, config: TrainConfig) -> str:
        """The validation split, and whether seen items are out of the ranking."""
        return f"validation, {config.monitor_seen}"

    def validate(self, config: TrainConfig) -> Validation:
        """Full catalogue ranking of the validation targets, with and without seen items."""
        encoded = encode(self.model, self.data, "validation", config.eval_batch)
        held = encoded.held
        ranks = rank(
            encoded.queries_ED,
            encoded.items_ND,
            targets_of(self.data.dataset, held),
            seen_by(self.data.dataset, held),
        )
        metrics = {
            (seen, name): float(values.mean())
            for seen, found in (("kept", ranks.kept), ("filtered", ranks.filtered))
            for name, values in per_user(found).items()
        }
        return Validation(
            metrics=metrics,
            users=len(held.users),
            monitored=metrics[config.monitor_seen, config.metric],
            shown={name: metrics[config.monitor_seen, name] for name in ("HR@10", "NDCG@10")},
        )


def check_trainable(dataset: Dataset) -> None:
    """Refuse interactions that are too few, before any work is done.

    Raises:
        UserError: Nothing could be learned, or nothing evaluated.
    """
    about = f"dataset {dataset.info.name!r}"
    if not len(dataset.held("validation").users):
        raise UserError(
            f"{about}: no user has {MIN_EVALUATED} interactions, so nothing can be validated or"
            " tested; prepare it with more"
        )
    if not (dataset.train_ends() - dataset.offsets[:-1] >= 2).any():
        raise UserError(
            f"{about}: no user has two training interactions, so nothing can be learned;"
            " prepare it with more"
        )
