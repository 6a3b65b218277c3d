"""The contract of a recommender: three methods; the loop and the evaluation know nothing else.

Legend: B batch, L sequence length, N items, D width of the shared space.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from features.errors import UserError
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


def check_positive(config: object, *names: str) -> None:
    """Refuse hyper-parameters that are not above zero.

    Raises:
        UserError: Names the first one and its value.
    """
    for name in names:
        if getattr(config, name) <= 0:
            raise UserError(f"{name}={getattr(config, name)} must be above 0")


def check_probability(config: object, *names: str) -> None:
    """Refuse what is no probability in [0, 1).

    Raises:
        UserError: Names the first one and its value.
    """
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"{name}={getattr(config, name)} must be in [0, 1)")


def check_heads(dim: int, heads: int) -> None:
    """Refuse a width that the heads cannot share.

    Raises:
        UserError: ``dim`` is not a multiple of ``heads``.
    """
    if dim % heads:
        raise UserError(f"dim={dim} is not a multiple of heads={heads}; change one of them")
