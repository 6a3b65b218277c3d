"""MMSRec (Song et al., arXiv:2304.13277): one transformer encodes items and sequences.

An item is one token for each modality, and a history is the tokens of its items, see
:mod:`trainer.modules.multimodal_encoder`. In training, the mask token replaces some items of a
history, and the model predicts these hidden items (a Cloze task) by cosine over the whole
catalogue. To predict the next item, the mask token is appended to the history.

Differences from the paper and the released code:

- A missing modality has no token. In the paper it has the mask token: ``missing="mask"``. An item
  without any modality has one special token.
- Positions count from the end of the sequence. In the released code they depend on the longest
  sequence of the batch.
- Each epoch draws windows with random ends, instead of one sample for each prefix.

Some options are not in the paper. A training has none of them by default, and a pre-training has
``centre`` and ``feature_dropout``:

- ``objective=next`` trains as SASRec does: each item of a history predicts the item after it, and
  no token attends to a later item.
- ``ids`` adds a learned vector of the item to its tokens and to its vector.
- ``whiten`` decorrelates frozen features, as WhitenRec does (Zhang et al., ICDE 2024).
- ``centre`` centres and scales the features, and ``feature_dropout`` drops some of them.
- ``candidates`` computes the softmax of a step over a sample of the catalogue, and
  ``loss=in-batch`` with ``negatives`` over the items of the batch and drawn ones.
- ``item_dropout=false`` scores items without dropout in the loss, and ``attention_dropout=false``
  keeps all attention weights.

Legend: B batch, L sequence length, N items, K of them, D width, M predicted positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from features.errors import UserError
from trainer.config import Choice, NonNegativeInt, Probability
from trainer.data.batches import Batch, ItemFeatures, Sequences
from trainer.data.device_copy import to_device
from trainer.data.windows import WindowSampling
from trainer.losses.base import DrawnItems, ItemVectors, Loss, Targets, targets_at
from trainer.losses.registry import LOSSES
from trainer.models.base import Catalogue, Pretraining, Recommender
from trainer.modules.chunked_encoding import (
    encode_blocks,
    encode_items_in_chunks,
    encode_slots_in_chunks,
)
from trainer.modules.item_views import View, encode_views
from trainer.modules.multimodal_encoder import MultimodalEncoder, MultimodalSettings
from trainer.modules.released_weights import (
    InitialisationSettings,
    initialise_attention_released,
)
from trainer.modules.whitening import input_map, without_centring

# Name to: probability of the mask token; probability of the mask token or a random item; number of
# items at the end of the catalogue that are never drawn as the random item.
_CORRUPTIONS = {"80-10-10": (0.8, 0.9, 0), "81-9-10": (0.81, 0.9, 1)}
_ITEMS_PER_BLOCK = 4096  # items of the catalogue that are encoded together without gradients
_SHARED = ("norm.", "transformer.")


_PUBLISHED: Mapping[str, Any] = {
    "batch_size": 8192,
    "lr": 1e-3,
    "stride": 1,
    "missing": "mask",
    "initialisation": "released",
    "epochs": 500,
    "patience": 10,
    "monitor": "Recall@10",
    "monitor_seen": "kept",
}
"""Section 4.2.4 of the paper for the Amazon datasets, with a window for each prefix of a history.
The preset ``published-dense`` is that for ML-1M."""
_NEXT_ITEM: Mapping[str, Any] = {
    "objective": "next",
    "ids": True,
    "whiten": True,
    "item_dropout": False,
    "attention_dropout": False,
    "loss": "in-batch",
    "negatives": 2048,
    "dim": 256,
    "hidden": 512,
    "heads": 2,
    "length": 51,
    "dropout": 0.6,
    "embed_dropout": 0.4,
    "temperature": 0.07,
    "batch_size": 128,
    "lr": 1e-3,
    "schedule": "cosine",
    "epochs": 4,
    "average": 0.99,
    "monitor": "NDCG@10",
}
"""A training that does not follow a paper: it predicts next items from features and learned
vectors. Its settings were chosen on the validation split of Amazon Beauty."""
_NEXT_ITEM_DENSE: Mapping[str, Any] = {
    **_NEXT_ITEM,
    "loss": "softmax",
    "negatives": 0,
    "dim": 128,
    "hidden": 256,
    "dropout": 0.5,
    "embed_dropout": 0.3,
    "epochs": 14,
    "min_steps": 2600,
}
"""For few items with many interactions, such as ML-1M, where it was better on validation: more
steps, and a softmax over the catalogue."""
_PUBLISHED_ALIGNMENT: Mapping[str, Any] = {
    "lr": 5e-5,
    "batch_size": 48_000,
    "epochs": 15,
    "patience": 15,
    "schedule": "exponential",
    "decay": 0.9,
    "duplicates": "keep",
    "missing": "mask",
    "initialisation": "released",
    "centre": False,
    "feature_dropout": 0.0,
    "holdout": 0.05,
}
"""Section 4.1.3 of the paper; training does not stop early. In the released code the negatives of
an item are the 6,000 items of one device."""


@dataclass(frozen=True, kw_only=True)
class MMSRecConfig(MultimodalSettings, InitialisationSettings):
    """Settings of MMSRec; sizes, dropout, temperature and mask ratio are the paper's."""

    loss: Annotated[str, Choice("loss", LOSSES)] = "softmax"
    """Loss of the predicted items: ``softmax`` over the catalogue (the paper) or ``candidates``,
    ``in-batch`` over the items of the batch, ``bce`` with one sampled negative."""
    objective: Annotated[str, Choice("objective", ("masked", "next"))] = "masked"
    """``masked``: predict hidden items of a history (the paper); ``next``: predict the item after
    each item with a causal encoder, which learns from every interaction in one pass."""
    mask_ratio: Probability = 0.2
    """With ``objective=masked``: share of the positions that are predicted. The last position is
    always predicted."""
    stride: NonNegativeInt = 0
    """With ``objective=masked``: interactions between two windows of a user; 0: half a window."""
    corruption: Annotated[str, Choice("corruption", _CORRUPTIONS)] = "80-10-10"
    """With ``objective=masked``: percentages of the predicted items that are replaced by the mask
    token, replaced by a random item, and kept. ``80-10-10`` is the paper; ``81-9-10`` is the
    released code, which never draws the last item of the catalogue."""


class MMSRec(MultimodalEncoder, Recommender):
    """The multimodal encoder, trained as a recommender on all modalities that have features.

    Raises:
        UserError: No modality has features.
    """

    settings_class: ClassVar[type[Any]] = MMSRecConfig
    needs_features = True
    takes_chunks = True
    # Each step encodes the whole catalogue, so larger batches make an epoch faster.
    train_defaults: ClassVar = {"batch_size": 256}
    variants: ClassVar = {
        "without vision": "--features text",
        "without text": "--features image",
        "without pre-training": "no --init",
        "sparser or denser data": "mmrec prepare --name NAME --k-core 4..7",
        "next item, not the Cloze task": "--set objective=next",
        "with ids, features whitened": "--set ids=true --set whiten=true",
    }
    presets: ClassVar = {
        "published": _PUBLISHED,
        "published-dense": {**_PUBLISHED, "length": 99, "dropout": 0.2},
        "released": {**_PUBLISHED, "missing": "drop", "corruption": "81-9-10"},
        "next-item": _NEXT_ITEM,
        "next-item-dense": _NEXT_ITEM_DENSE,
    }
    pretraining = Pretraining(
        task="alignment",
        settings={
            "batch_size": 256,
            "epochs": 50,
            "monitor": "MRR",
            "centre": True,
            "feature_dropout": 0.75,
        },
        presets={
            "published": _PUBLISHED_ALIGNMENT,
            "released": {
                **_PUBLISHED_ALIGNMENT,
                "batch_size": 6000,
                "epochs": 50,
                "patience": 50,
                "missing": "drop",
            },
        },
    )
    # One encoder encodes items and sequences, so each group contains it.
    transfer_groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "items": ("whitening.", "centring.", "inputs.", "id.", "outputs.", "modality.", *_SHARED),
        "users": ("position.", "instead.", *_SHARED),
        "text": (
            *("whitening.text.", "centring.text.", "inputs.text.", "outputs.text."),
            *("modality.", "position.", "instead.", *_SHARED),
        ),
        "image": (  # images or videos
            *("whitening.image.", "centring.image.", "inputs.image.", "outputs.image."),
            *("whitening.video.", "centring.video.", "inputs.video.", "outputs.video."),
            *("modality.", "position.", "instead.", *_SHARED),
        ),
    }
    item_tables = ("id.",)
    masks_item_tables = True  # by known_N
    fitted_buffers = ("known_N",)
    modality_tables = ("modality.weight",)
    reverse_positions = ("position.weight",)
    settings: MMSRecConfig

    def __init__(self, settings: MMSRecConfig, catalogue: Catalogue) -> None:
        if not catalogue.widths:
            raise UserError(
                "mmsrec needs features; run mmrec extract for this dataset, or train sasrec"
            )
        causal = settings.objective == "next"
        MultimodalEncoder.__init__(
            self, settings, catalogue.n_items, catalogue.widths, causal=causal
        )
        if settings.initialisation == "released":
            initialise_attention_released(self.transformer)
        self.item_loss: Loss = LOSSES.find(settings.loss)(settings)

    @property
    def window_sampling(self) -> WindowSampling:
        """Windows that cover each interaction with ``objective=next``, else with random ends."""
        length = self.settings.length + 1
        if self.causal:
            return WindowSampling(length=length, stride=length - 1, every_target=True)
        stride = self.settings.stride or max(1, length // 2)
        return WindowSampling(length=length, stride=stride, every_target=False)

    @property
    def history(self) -> int:
        """Largest number of items of a history that the encoder reads."""
        return self.settings.length

    def encode_items(self, features: ItemFeatures) -> Tensor:
        """Encode each item as a sequence of one item: (N, D)."""
        item_N = torch.arange(features.n_items, device=self.mask_token_D.device)
        if torch.is_grad_enabled():
            return encode_items_in_chunks(self, item_N, features)
        return encode_blocks(
            lambda item_K: encode_items_in_chunks(self, item_K, features), item_N, _ITEMS_PER_BLOCK
        )

    def encode_sequences(
        self, item_vectors_ND: Tensor, sequences: Sequences, features: ItemFeatures
    ) -> Tensor:
        """Encode the mask token appended to each history: (B, D).

        With ``objective=next``, encode the last item of each history.
        """
        if not self.causal:
            device, sequences = sequences.items_BL.device, sequences.on_host
            items_BL = functional.pad(sequences.items_BL, (0, 1))
            sequences = Sequences(items_BL=items_BL, lengths_B=sequences.lengths_B + 1).to(device)
        last_BL = _last_slots(sequences.on_host)
        query_BD, order_B = encode_slots_in_chunks(
            self, sequences, features, None if self.causal else last_BL, last_BL
        )
        return query_BD[to_device(order_B.argsort(), query_BD.device)]

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss of the predicted items."""
        query_MD, targets = self._next_items(batch) if self.causal else self._hidden_items(batch)
        drawn = self.item_loss.draw(targets, batch)
        items = self._loss_items(batch, drawn)
        return {"loss": self.item_loss(query_MD, items, targets, batch, drawn)}

    def _loss_items(self, batch: Batch, drawn: DrawnItems | None) -> ItemVectors:
        """Encode the items that the loss scores."""
        if self.item_loss.needs_catalogue:
            return ItemVectors(vectors_KD=self.encode_items(batch.features))
        if drawn is not None and drawn.includes_targets:
            ids_K = drawn.items_X
        else:
            ids_K = batch.distinct_items(None if drawn is None else drawn.on_host.items_X)
        vectors_KD = encode_items_in_chunks(self, ids_K, batch.features)
        return ItemVectors(vectors_KD=vectors_KD, ids_K=ids_K)

    def _hidden_items(self, batch: Batch) -> tuple[Tensor, Targets]:
        """Draw the positions to predict, and corrupt their items (section 3.3 of the paper).

        The last item is always predicted and always hidden. Of the other predicted items,
        80 % become the mask token, 10 % become a random item, and 10 % stay; the setting
        ``corruption`` selects other percentages.

        Returns:
            (M, D) queries, and the items to predict.
        """
        sequences, generator = batch.sequences.on_host, batch.generator
        items_BL, last_BL = sequences.items_BL, _last_slots(sequences)
        chosen_BL = torch.rand(items_BL.shape, generator=generator)
        chosen_BL = ((chosen_BL < self.settings.mask_ratio) & sequences.mask_BL) | last_BL
        uniform_BL = torch.rand(items_BL.shape, generator=generator)
        masked, swapped, left_out = _CORRUPTIONS[self.settings.corruption]
        n_random = max(1, batch.features.n_items - batch.train.hidden - left_out)
        random_BL = torch.randint(n_random, items_BL.shape, generator=generator)
        hidden_BL = chosen_BL & ((uniform_BL < masked) | last_BL)
        swapped_BL = chosen_BL & ~hidden_BL & (uniform_BL < swapped)
        shown_BL = torch.where(swapped_BL, random_BL, items_BL)
        shown = Sequences(items_BL=shown_BL, lengths_B=sequences.lengths_B).to(batch.device)
        query_MD, order_B = encode_slots_in_chunks(
            self, shown, batch.features, hidden_BL, chosen_BL
        )
        history_BL = items_BL if self.item_loss.reads_history else None
        targets = _targets(items_BL, chosen_BL, order_B, history_BL, includes_slot=False)
        return query_MD, targets.to(batch.device)

    def _next_items(self, batch: Batch) -> tuple[Tensor, Targets]:
        """Return the queries (M, D) of all items but the last, and the item after each of them."""
        windows = batch.sequences.on_host
        shown = Sequences(items_BL=windows.items_BL[:, :-1], lengths_B=windows.lengths_B - 1)
        valid_BL, shown = shown.mask_BL, shown.to(batch.device)
        query_MD, order_B = encode_slots_in_chunks(self, shown, batch.features, None, valid_BL)
        history_BL = windows.items_BL[:, :-1] if self.item_loss.reads_history else None
        targets = _targets(windows.items_BL[:, 1:], valid_BL, order_B, history_BL)
        return query_MD, targets.to(batch.device)

    def row_tables(self) -> list[nn.Embedding]:
        """Return the table of learned vectors if the loss reads a part of the catalogue."""
        return [] if self.item_loss.needs_catalogue or not self.settings.ids else [self.id]

    @property
    def temperature(self) -> float:
        """Divisor of the cosines in the alignment of modalities, the same as in the loss."""
        return self.settings.temperature

    @property
    def unaligned(self) -> tuple[str, ...]:
        """Names of the parameters that :meth:`encode_views` does not read."""
        mask = ("instead.weight",) if self.settings.missing == "drop" else ()
        return *mask, *(("id.weight",) if self.settings.ids else ())

    def adapted(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the weights of another run, for features that are mapped as in this model.

        Raises:
            UserError: The other run has whitened its features and this model does not, or the
                other way round, or only this model centres its features.
        """
        other = input_map(tensors)
        own = "whiten" if self.settings.whiten else "centre" if self.settings.centre else ""
        if own == other or not any(key.startswith("inputs.") for key in tensors):
            return tensors
        if own or other != "centre":
            has, wants = (f"{name}=true" if name else "neither" for name in (other, own))
            raise UserError(
                "of whiten=true and centre=true, the run to start from has"
                f" {has} and this model {wants}, so its first layers read other features; set"
                f" {f'{other}=true' if other else f'{own}=false'}, or give --transfer users"
            )
        return without_centring(tensors)

    def encode_views(
        self, items_K: Tensor, views: Sequence[View], features: ItemFeatures
    ) -> list[Tensor]:
        """Encode items from some of their modalities; see :func:`item_views.encode_views`."""
        return encode_views(self, items_K, views, features)


def _targets(
    items_BL: Tensor,
    is_target_BL: Tensor,
    order_B: Tensor,
    history_BL: Tensor | None,
    *,
    includes_slot: bool = True,
) -> Targets:
    """Return the targets, with the rows of the batch in the order of the queries."""
    targets, _ = targets_at(
        is_target_BL[order_B],
        items_BL[order_B],
        history_BL=None if history_BL is None else history_BL[order_B],
        includes_slot=includes_slot,
    )
    return replace(targets, row_M=order_B[targets.row_M])


def _last_slots(sequences: Sequences) -> Tensor:
    """Return (B, L) bool, true at the last item of each sequence."""
    columns_L = torch.arange(sequences.items_BL.shape[1], device=sequences.items_BL.device)
    return columns_L == sequences.lengths_B[:, None] - 1
