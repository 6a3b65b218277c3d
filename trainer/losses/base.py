"""The base class of next-item losses, their settings and their inputs.

A loss reads query and item vectors, never a model. A model asks the loss which items it draws,
encodes them together with the items of the batch, and calls the loss.

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

from trainer.config import (
    AUTO,
    CandidateCount,
    Choice,
    NonNegativeFloat,
    NonNegativeInt,
    Range,
    Temperature,
    WidthSettings,
)
from trainer.data.batches import Batch
from trainer.data.device_copy import DeviceCopy

SCORES = ("dot", "scaled", "cosine")
"""Values of the setting ``score``."""
EXCLUDED = ("history", "window")
"""Values of the setting ``exclude``."""


@dataclass(frozen=True, kw_only=True)
class LossSettings(WidthSettings):
    """Settings of the scores and of the next-item loss, the same in every model."""

    score: Annotated[str, Choice("score", SCORES)] = "dot"
    """``dot``: inner product of query and item vector; ``scaled``: inner product / sqrt(``dim``) in
    the loss, so that initial scores are of equal size at any width; ``cosine``: vectors of
    length 1."""
    temperature: Temperature = 1.0
    """Divisor of the scores in the loss; with ``score=cosine``, about 0.07."""
    candidates: CandidateCount = AUTO
    """With ``loss=softmax``: number of items in the softmax of a step. They are the targets and
    uniformly drawn items, weighted to represent the rest of the catalogue. 0: all items. ``auto``:
    all items up to 50,000, and 4,096 candidates above."""
    debias: bool = True
    """With ``loss=in-batch``: subtract the log popularity of an item from its score, because
    popular items are more often in a batch."""
    exclude: Annotated[str, Choice("exclude", EXCLUDED)] = "history"
    """Items of the batch that are no negatives of a user: with ``history`` all training items of
    the user (PMMRec, Eq. 5); with ``window`` those of the row's window (the released code), so that
    other items that the user has are negatives. Read by ``loss=in-batch``, by the pairwise losses
    and by ``align``."""
    negatives: NonNegativeInt = 0
    """With a pairwise loss: number of items drawn in each step, which are negatives of all rows
    besides the items of the batch (``n_sample`` of GRU4Rec)."""
    negatives_power: Annotated[float, Range(0, 1, "in [0, 1]", includes_high=True)] = 0.0
    """An item is drawn with a probability proportional to this power of its training interactions;
    0: all items are equally likely (``sample_alpha`` of GRU4Rec)."""
    score_penalty: NonNegativeFloat = 1.0
    """With ``loss=bpr-max``: weight of the squared scores of the negatives (``bpreg`` of
    GRU4Rec)."""

    @property
    def scale(self) -> float:
        """Factor on inner products in the loss: 1 / (temperature * sqrt(dim) if scaled)."""
        root = math.sqrt(self.dim) if self.score == "scaled" else 1.0
        return 1 / (self.temperature * root)

    def normalise(self, x: Tensor) -> Tensor:
        """Return vectors (..., D), scaled to length 1 with ``score=cosine``, else unchanged."""
        return functional.normalize(x, dim=-1) if self.score == "cosine" else x


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets(DeviceCopy):
    """The predicted positions of a batch."""

    item_M: Tensor
    """(M,) int64, the item to predict at each position."""
    row_M: Tensor
    """(M,) int64, the row of the batch that each position belongs to."""


def targets_at(is_target_BL: Tensor, items_BL: Tensor) -> tuple[Targets, Tensor]:
    """Return the targets at some slots, and the slots, row by row; all tensors are on the CPU.

    Args:
        is_target_BL: (B, L) bool, true at the slots.
        items_BL: (B, L) int64, the item to predict at each slot.

    Returns:
        The targets, and (M,) int64, the index of each slot in the flattened B x L.
    """
    slot_M = is_target_BL.flatten().nonzero()[:, 0]
    row_M = slot_M // is_target_BL.shape[1]
    return Targets(item_M=items_BL.flatten()[slot_M], row_M=row_M), slot_M


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemVectors:
    """Vectors of K items, found by their ids."""

    vectors_KD: Tensor
    """(K, D) vectors."""
    ids_K: Tensor | None = None
    """(K,) int64, ascending without repetition, or the tensor of the items that the loss has drawn;
    ``None``: the vectors are those of the whole catalogue, in its order."""

    def rows(self, ids: Tensor) -> Tensor:
        """Return the row of each id in ``vectors_KD``, int64 of the same shape.

        Every id must be one of ``ids_K``, which must be ascending.
        """
        if self.ids_K is None:
            return ids
        return torch.searchsorted(self.ids_K, ids.contiguous())

    def gather(self, ids: Tensor) -> Tensor:
        """Return the vector of each id: (..., D)."""
        if ids is self.ids_K:
            return self.vectors_KD
        # The backward pass of `vectors_KD[...]` adds in an order that depends on the threads.
        return functional.embedding(self.rows(ids), self.vectors_KD)


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnItems(DeviceCopy):
    """Items that a loss draws for a batch. Subclasses add fields that the loss needs.

    They are drawn on the host, and copied to the device of the batch by ``to``.
    """

    items_X: Tensor
    """(X,) int64 ids, possibly repeated."""
    includes_targets: ClassVar[bool] = False
    """True if the loss scores the drawn items only."""


class Loss(ABC):
    """Base class of next-item losses.

    Args:
        settings: Settings of the loss; ``settings.scale`` is the factor on inner products.
    """

    def __init__(self, settings: LossSettings) -> None:
        self.settings = settings

    @property
    def needs_catalogue(self) -> bool:
        """True if the loss scores every item of the catalogue; by default False."""
        return False

    def draw(self, targets: Targets, batch: Batch) -> DrawnItems | None:
        """Draw the items that the loss needs besides the items of the batch; by default None.

        The draw is made on the host, from ``targets.on_host`` and ``batch.sequences.on_host``: the
        result is on the device of the batch, see :meth:`DrawnItems.to`.
        """
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
        """Return the loss of a batch, a scalar.

        With several processes it is the share of this process in the mean over all rows, see
        :mod:`trainer.distributed`.

        Args:
            query_MD: (M, D) states at the predicted positions.
            items: Vectors of the items of the batch and of the drawn items, or of the catalogue.
            targets: The predicted positions.
            batch: The batch.
            drawn: The result of :meth:`draw`.
        """
