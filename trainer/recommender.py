"""The contract of a recommender: two towers, a loss, and how it reads histories.

The loop and the evaluation know nothing else of it.

Legend: B batch, L sequence length, N items, D width of the shared space.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from trainer.data import Batch, ItemFeatures, Sequences, WindowPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Catalogue:
    """What a recommender is built for: it may size its tables by this, and see nothing else."""

    n_items: int
    widths: dict[str, int]
    """Modality -> width of its features, in the order given; empty without features."""


class Recommender(nn.Module, ABC):
    """An item tower and a sequence tower that meet in one space; a score is an inner product."""

    @property
    @abstractmethod
    def plan(self) -> WindowPlan:
        """How the training histories are to be cut."""

    @property
    @abstractmethod
    def history(self) -> int:
        """Most items of a history that the sequence tower reads."""

    @abstractmethod
    def encode_items(self, features: ItemFeatures) -> Tensor:
        """Encode the whole catalogue: (N, D)."""

    @abstractmethod
    def encode_sequences(
        self, item_vectors_ND: Tensor, sequences: Sequences, features: ItemFeatures
    ) -> Tensor:
        """Encode histories into the query for the next item: (B, D).

        Args:
            item_vectors_ND: What ``encode_items`` gave.
            sequences: Histories of at most ``history`` items.
            features: For towers that read an item's modalities one by one.
        """

    @abstractmethod
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Named scalars of one batch; ``loss`` is the one that is minimised."""
