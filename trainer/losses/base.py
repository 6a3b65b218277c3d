"""The contract of a next-item loss: what it draws, and how it scores.

A loss sees inner products of queries and item vectors only. A model asks the loss which items it
draws, encodes them together with the items of the batch, and calls the loss.

Legend: B batch, M predicted positions, K encoded items, X drawn items, N items of the catalogue,
D width.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from trainer.config import Choice, NonNegativeInt, Temperature, WidthSettings
from trainer.data.batches import Batch

SCORES = ("dot", "scaled", "cosine")


@dataclass(frozen=True, kw_only=True)
class LossSettings(WidthSettings):
    """Settings of the scores and of the next-item loss, the same in every model."""

    score: Annotated[str, Choice("score", SCORES)] = "dot"
    """``dot``: inner product of query and item vector; ``scaled``: inner product / sqrt(``dim``) in
    the loss, so that training starts alike at any width; ``cosine``: vectors of length 1."""
    temperature: Temperature = 1.0
    """Divisor of the scores in the loss; a cosine needs one of about 0.07."""
    candidates: NonNegativeInt = 0
    """With ``loss=softmax``: items of a step's softmax, namely the targets and others drawn evenly,
    which are weighted to represent the rest; 0: the whole catalogue."""
    debias: bool = True
    """With ``loss=in-batch``: subtract the log popularity from the scores, because popular items
    are drawn more often."""

    @property
    def scale(self) -> float:
        """Factor on inner products in the loss."""
        root = math.sqrt(self.dim) if self.score == "scaled" else 1.0
        return 1 / (self.temperature * root)

    def normalise(self, x: Tensor) -> Tensor:
        """Return vectors (..., D) of length 1 with ``score=cosine``, else ``x`` itself."""
        return functional.normalize(x, dim=-1) if self.score == "cosine" else x


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """The predicted positions of a batch."""

    item_M: Tensor
    """(M,) int64, the item to predict at each position."""
    row_M: Tensor
    """(M,) int64, the row of the batch that each position belongs to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemVectors:
    """Encoded items."""

    vectors_KD: Tensor
    ids_K: Tensor | None = None
    """(K,) int64, ascending without repetition, or exactly the items that the loss has drawn;
    ``None``: the whole catalogue in its order."""

    def places(self, ids: Tensor) -> Tensor:
        """Return the row of each id, int64 of the same shape; every id must be encoded."""
        if self.ids_K is None:
            return ids
        return torch.searchsorted(self.ids_K, ids.contiguous())

    def gather(self, ids: Tensor) -> Tensor:
        """Return the vectors of ids: (..., D)."""
        if ids is self.ids_K:
            return self.vectors_KD
        # Not `vectors_KD[...]`: the order in which its backward pass adds depends on the threads.
        return functional.embedding(self.places(ids), self.vectors_KD)


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnItems:
    """Items that a loss draws for a batch; subclasses add what else the loss needs."""

    items_X: Tensor
    """(X,) int64 ids, possibly repeated."""
    includes_targets: ClassVar[bool] = False
    """True if the loss needs no other items than the drawn ones."""


class Loss(ABC):
    """A loss over the scores of the next item.

    Args:
        settings: Settings of all losses; ``settings.scale`` is the factor on inner products.
    """

    def __init__(self, settings: LossSettings) -> None:
        self.settings = settings

    @property
    def needs_catalogue(self) -> bool:
        """True if every item of the catalogue is encoded in each step; by default False."""
        return False

    def draw(self, targets: Targets, batch: Batch) -> DrawnItems | None:
        """Draw the items that are needed besides those of the batch; by default none."""
        return None

    @abstractmethod
    def __call__(
        self,
        query_MD: Tensor,
        items: ItemVectors,
        targets: Targets,
        batch: Batch,
        drawn: DrawnItems | None,
    ) -> Tensor:
        """Return the loss of a batch: a scalar.

        In one of several processes it is the share of the mean over all rows, see
        :mod:`trainer.distributed`.

        Args:
            query_MD: (M, D) states at the predicted positions.
            items: Vectors of the items of the batch and of the drawn items, or of the catalogue.
            targets: The predicted positions.
            batch: The batch.
            drawn: What :meth:`draw` returned.
        """
