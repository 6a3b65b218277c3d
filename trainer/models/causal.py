"""The base class of models with a causal sequence encoder, which predict the item after each item.

Legend: B batch, L sequence length, N items, K distinct items, M predicted positions, D width.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.config import Choice
from trainer.data.batches import Batch, ItemFeatures, Sequences
from trainer.data.device_copy import to_device
from trainer.data.windows import WindowSampling
from trainer.losses.base import (
    DrawnItems,
    ItemVectors,
    Loss,
    LossSettings,
    Targets,
    targets_at,
)
from trainer.losses.registry import LOSSES
from trainer.models.base import Catalogue, Recommender
from trainer.modules.chunked_encoding import encode_blocks, encode_in_chunks
from trainer.modules.item_encoder import ItemEncoder
from trainer.modules.sequence_encoders import (
    SequenceEncoder,
    SequenceSettings,
    last_state,
    take_slots,
)

ROWS = ("windows", "prefixes")
"""Values of the setting ``rows``."""
_TOKENS_PER_CHUNK = 2**15  # of the catalogue; bounds the activations without gradients


@dataclass(frozen=True, kw_only=True)
class CausalSettings(SequenceSettings, LossSettings):
    """Settings of every model with a causal sequence encoder."""

    loss: Annotated[str, Choice("loss", LOSSES)] = "softmax"
    """Next-item loss: ``softmax`` over the catalogue (or ``candidates`` of it), ``in-batch`` over
    the items of the batch, ``bce`` with one sampled negative for each position; ``bpr``, ``top1``,
    ``bpr-max`` and ``top1-max``: pairs of the target and each other item of the batch."""
    rows: Annotated[str, Choice("rows", ROWS)] = "windows"
    """``windows``: each window of a history is a row, and every item after the first is a target;
    ``prefixes``: each prefix of a history is a row, and the item after it is the only target (the
    rows of RecBole: one pass over the data costs as many rows as there are interactions)."""


class CausalRecommender(Recommender):
    """A causal sequence encoder over item vectors, with a next-item loss at every position.

    A subclass creates ``item_encoder`` and ``sequence_encoder`` in its constructor, and implements
    :meth:`encode_some`.
    """

    takes_chunks = True
    transfer_groups: ClassVar = {"items": ("item_encoder.",), "users": ("sequence_encoder.",)}
    reverse_positions: ClassVar[tuple[str, ...]] = ("sequence_encoder.position.weight",)

    settings: CausalSettings
    item_encoder: nn.Module
    sequence_encoder: SequenceEncoder

    def __init__(self, settings: CausalSettings, catalogue: Catalogue) -> None:
        super().__init__(settings, catalogue)
        self.next_item_loss: Loss = LOSSES.find(settings.loss)(settings)

    @abstractmethod
    def encode_some(self, items_K: Tensor, features: ItemFeatures) -> Tensor:
        """Encode the given items: (K, D), before normalisation.

        Args:
            items_K: (K,) int64 item ids, without repetition.
            features: Features of the whole catalogue.
        """

    @property
    def window_sampling(self) -> WindowSampling:
        """Windows over whole histories, or a window for each prefix with ``rows=prefixes``."""
        return row_windows(self.settings.rows, self.settings.length)

    @property
    def history(self) -> int:
        """Largest number of items of a history that the sequence encoder reads."""
        return self.settings.length

    def encode_items(self, features: ItemFeatures) -> Tensor:
        """Encode the whole catalogue: (N, D); with ``score=cosine`` the vectors have length 1."""
        longest = max([1, *(tokens.longest for tokens in features.tokens.values())])
        items_N = torch.arange(features.n_items, device=next(self.parameters()).device)
        size = max(1, _TOKENS_PER_CHUNK // longest)
        return encode_blocks(
            lambda items_K: self.settings.normalise(self.encode_some(items_K, features)),
            items_N,
            size,
            chunks=self.chunks,
        )

    def encode_sequences(
        self, item_vectors_ND: Tensor, sequences: Sequences, features: ItemFeatures
    ) -> Tensor:
        """Return the state at each history's last item: (B, D)."""
        states_BLD = self.states(ItemVectors(vectors_KD=item_vectors_ND), sequences)
        return self.settings.normalise(last_state(states_BLD, sequences))

    def adapted(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the weights of another run, for features that are centred as in this model."""
        encoder = self.item_encoder
        return (
            encoder.adapted(tensors, "item_encoder.")
            if isinstance(encoder, ItemEncoder)
            else tensors
        )

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the next-item loss over the predicted positions."""
        inputs, targets, slot_M = self.targets(batch)
        drawn = self.next_item_loss.draw(targets, batch)
        items = self.batch_items(batch, drawn)
        query_MD = self.settings.normalise(take_slots(self.states(items, inputs), slot_M))
        return {"loss": self.next_item_loss(query_MD, items, targets, batch, drawn)}

    def targets(self, batch: Batch) -> tuple[Sequences, Targets, Tensor]:
        """Split windows into inputs and targets; see :func:`next_item_targets`."""
        return next_item_targets(
            batch,
            only_last=self.settings.rows == "prefixes",
            with_history=self.next_item_loss.reads_history,
        )

    def batch_items(self, batch: Batch, drawn: DrawnItems | None) -> ItemVectors:
        """Encode each distinct item of the batch and of the drawn items.

        If the loss needs the catalogue, encode the whole catalogue instead.
        """
        if self.next_item_loss.needs_catalogue:
            return ItemVectors(vectors_KD=self.encode_items(batch.features))
        ids_K = batch.distinct_items(None if drawn is None else drawn.on_host.items_X)
        vectors_KD = self.settings.normalise(self.encode_distinct(ids_K, batch.features))
        return ItemVectors(vectors_KD=vectors_KD, ids_K=ids_K)

    def encode_distinct(self, items_K: Tensor, features: ItemFeatures) -> Tensor:
        """Encode items as :meth:`encode_some`, in ``chunks``: (K, D)."""
        return encode_in_chunks(
            lambda chunk_K: self.encode_some(chunk_K, features), self.chunks, items_K
        )

    def states(self, items: ItemVectors, sequences: Sequences) -> Tensor:
        """Return the state after each item: (B, L, D), before normalisation.

        Args:
            items: Vectors that include all items of the sequences.
            sequences: The sequences.
        """
        return self.encode_rows(items.gather, sequences)

    def encode_rows(self, embed: Callable[[Tensor], Tensor], sequences: Sequences) -> Tensor:
        """Return the states of the sequence encoder (B, L, D), computed in ``chunks`` of rows.

        Args:
            embed: Function of (B, L) items that returns their vectors (B, L, D).
            sequences: The sequences.
        """
        return encode_in_chunks(
            lambda items_BL, lengths_B: self.sequence_encoder(embed(items_BL), lengths_B),
            self.chunks,
            sequences.items_BL,
            sequences.lengths_B,
        )


def row_windows(rows: str, length: int) -> WindowSampling:
    """Return the windows that are the rows of a training.

    Args:
        rows: One of :data:`ROWS`.
        length: Largest number of items of a history; a window holds the predicted item as well.
    """
    if rows == "prefixes":
        return WindowSampling(length=length + 1, stride=1, every_target=False)
    return WindowSampling(length=length + 1, stride=length, every_target=True)


def next_item_targets(
    batch: Batch, *, only_last: bool = False, with_history: bool = False
) -> tuple[Sequences, Targets, Tensor]:
    """Split windows into inputs and targets.

    Args:
        batch: The batch.
        only_last: If true, the last item of each window is its only target.
        with_history: If true, the targets hold the inputs up to each predicted position.

    Returns:
        The inputs (all items of a window but the last), the targets, and (M,) int64, the slots of
        the inputs that have a target, as :func:`take_slots` takes them.
    """
    windows = batch.sequences.on_host
    # Padding becomes an item of the batch, so that no other item has to be encoded.
    items_BL = torch.where(windows.mask_BL, windows.items_BL, windows.items_BL[0, 0])
    is_target_BL = windows.mask_BL[:, 1:]
    if only_last:
        is_target_BL = is_target_BL & ~functional.pad(windows.mask_BL[:, 2:], (0, 1))
    inputs = Sequences(
        items_BL=items_BL[:, :-1],
        lengths_B=(windows.lengths_B - 1).clamp_min(1),
        users_B=windows.users_B,
    )
    targets, slot_M = targets_at(
        is_target_BL, items_BL[:, 1:], history_BL=inputs.items_BL if with_history else None
    )
    return inputs.to(batch.device), targets.to(batch.device), to_device(slot_M, batch.device)
