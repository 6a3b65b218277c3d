"""The base class of next-item losses, their settings and their inputs.

A loss reads query and item vectors, never a model. A model asks the loss which items it draws,
encodes them together with the items of the batch, and calls the loss.

Legend: B batch, M predicted positions, K encoded items, X drawn items, N items of the catalogue,
D width, P pairs of a position and an item of its history.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
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
    """With ``loss=in-batch``: subtract the log of the expected count of an item in a batch from its
    score, because popular items are more often in a batch."""
    debias_target: bool = True
    """With ``debias``: correct the score of the target like those of negatives; false: correct the
    negatives only, so that the gradient estimates that of the softmax over the catalogue, without
    the other items of the user (Khrylchenko et al., RecSys 2025, arXiv:2507.09331)."""
    exclude: Annotated[str, Choice("exclude", EXCLUDED)] = "history"
    """Items of the batch that are no negatives of a user: with ``history`` all training items of
    the user; with ``window`` those of the row's window, so that other items that the user has are
    negatives (PMMRec, Eq. 5, as released). Read by ``loss=in-batch``, by the pairwise losses and by
    ``align``."""
    negatives: NonNegativeInt = 0
    """With ``loss=in-batch`` or a pairwise loss: number of items drawn in each step, which are
    negatives of all rows besides the items of the batch (``n_sample`` of GRU4Rec)."""
    negatives_power: Annotated[float, Range(0, 1, "in [0, 1]", includes_high=True)] = 0.0
    """An item is drawn with a probability proportional to this power of its training interactions;
    0: all items are equally likely, those without training interactions too (``sample_alpha`` of
    GRU4Rec)."""
    score_penalty: NonNegativeFloat = 1.0
    """With ``loss=bpr-max``: weight of the squared scores of the negatives (``bpreg`` of
    GRU4Rec)."""
    history_bias: bool = False
    """Add one learned number to the scores of the items of a history, in the softmax and in the
    ranking. It starts at the log of the share of training targets that repeat an item of their
    history. Other losses than ``softmax`` do not change it."""

    @property
    def scale(self) -> float:
        """Factor on inner products in the loss: 1 / (temperature * sqrt(dim) if scaled)."""
        root = math.sqrt(self.dim) if self.score == "scaled" else 1.0
        return 1 / (self.temperature * root)

    def normalise(self, x: Tensor) -> Tensor:
        """Return vectors (..., D), scaled to length 1 with ``score=cosine``, else unchanged."""
        return functional.normalize(x, dim=-1) if self.score == "cosine" else x


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoryPairs(DeviceCopy):
    """The distinct items of the history at each predicted position."""

    row_P: Tensor
    """(P,) int64, the predicted position, ascending."""
    item_P: Tensor
    """(P,) int64, the item. No pair occurs twice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets(DeviceCopy):
    """The predicted positions of a batch."""

    item_M: Tensor
    """(M,) int64, the item to predict at each position."""
    row_M: Tensor
    """(M,) int64, the row of the batch that each position belongs to."""
    history: HistoryPairs | None = None
    """The history at each position; ``None`` if the loss does not read it."""


def targets_at(
    is_target_BL: Tensor,
    items_BL: Tensor,
    *,
    history_BL: Tensor | None = None,
    includes_slot: bool = True,
) -> tuple[Targets, Tensor]:
    """Return the targets at some slots, and the slots, row by row; all tensors are on the CPU.

    Args:
        is_target_BL: (B, L) bool, true at the slots.
        items_BL: (B, L) int64, the item to predict at each slot.
        history_BL: (B, L) int64, the items that a history consists of, oldest first; ``None``: the
            targets have no history.
        includes_slot: If true, a history ends at the column of its slot, else one column before.

    Returns:
        The targets, and (M,) int64, the index of each slot in the flattened B x L.
    """
    slot_M = is_target_BL.flatten().nonzero()[:, 0]
    row_M, column_M = slot_M // is_target_BL.shape[1], slot_M % is_target_BL.shape[1]
    history = None
    if history_BL is not None:
        last_M = column_M if includes_slot else column_M - 1
        history = history_pairs(history_BL, row_M, last_M)
    item_M = items_BL.flatten()[slot_M]
    return Targets(item_M=item_M, row_M=row_M, history=history), slot_M


def history_pairs(items_BL: Tensor, row_M: Tensor, last_M: Tensor) -> HistoryPairs:
    """Return the distinct items of each predicted position's history; all tensors are on the CPU.

    Args:
        items_BL: (B, L) int64, the items of each row, oldest first.
        row_M: (M,) int64, the row of each position.
        last_M: (M,) int64, the column of the last item of its history; -1: there is none.
    """
    columns_L = torch.arange(items_BL.shape[1])
    sorted_BL, order_BL = items_BL.sort(dim=1, stable=True)
    is_repeated_BL = sorted_BL[:, 1:] == sorted_BL[:, :-1]
    later_BL = torch.full_like(items_BL, len(columns_L))
    later_BL[:, :-1] = torch.where(is_repeated_BL, order_BL[:, 1:], len(columns_L))
    next_BL = torch.empty_like(items_BL).scatter_(1, order_BL, later_BL)
    # The last occurrence of an item in the history stands for all of them.
    is_last_ML = (columns_L <= last_M[:, None]) & (next_BL[row_M] > last_M[:, None])
    position_P, column_P = is_last_ML.nonzero(as_tuple=True)
    return HistoryPairs(row_P=position_P, item_P=items_BL[row_M[position_P], column_P])


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


class Loss(nn.Module, ABC):
    """Base class of next-item losses.

    Args:
        settings: Settings of the loss; ``settings.scale`` is the factor on inner products.
    """

    reads: ClassVar[frozenset[str] | None] = None
    """Names of the settings that this loss reads and some other losses do not; ``None`` if the
    class does not say which."""
    learns_history_bias: ClassVar[bool] = False
    """True if the loss scores items of the history, so that its gradients change their bias."""
    history_bias: Tensor | None
    """Scalar, added to the scaled scores of the items of a history; ``None`` without
    ``history_bias``."""

    def __init__(self, settings: LossSettings) -> None:
        super().__init__()
        self.settings = settings
        bias = nn.Parameter(torch.zeros(()), self.learns_history_bias)
        self.register_parameter("history_bias", bias if settings.history_bias else None)

    @property
    def reads_history(self) -> bool:
        """True if the loss reads ``Targets.history``."""
        return self.settings.history_bias and self.learns_history_bias

    def start_history_bias(self, repeated: int, targets: int) -> None:
        """Set the bias to the log of the share of targets that repeat an item of their history.

        Args:
            repeated: Number of these training targets.
            targets: Number of all training targets.
        """
        if self.history_bias is not None:
            nn.init.constant_(self.history_bias, math.log((repeated + 1) / (targets + 2)))

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
    def forward(
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
