"""PMMRec (Li et al., arXiv:2312.09602): a transferable model whose items are modalities only.

The tokens of an item's modalities go through a merge-attention block, and their mean is the item's
vector. With a single modality the vector is the mean of the projected tokens. A causal transformer
reads the items of a history. Fine-tuning predicts the next item among the items of the batch (DAP,
``loss=in-batch``); pre-training adds the alignment of modalities (NICL) and two objectives on
corrupted sequences (NID, RCL), see :mod:`trainer.losses.pmmrec`.

Where code and paper differ, or the paper's form cannot be trained, the sound form is the default.
The settings ``pool``, ``token_types``, ``debias``, ``exclude``, ``align_temperature``,
``align_literal``, ``nid_relu`` and ``rcl_*`` select the published form. A learned token replaces a
modality that an item lacks.

Legend: B batch, L sequence length, N items, K distinct items, T tokens, D width, M positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from features.errors import UserError
from trainer.config import Choice, PositiveInt, Probability, Temperature
from trainer.data.batches import Batch, ItemFeatures, Sequences, TrainSet
from trainer.data.device_copy import to_device
from trainer.distributed import gather_ids, gather_rows, rank_offset
from trainer.finetune.upper_blocks import item_tokens
from trainer.losses.base import SCORES, ItemVectors, targets_at
from trainer.losses.batch_columns import count_items, own_items
from trainer.losses.pmmrec import (
    ALIGNMENTS,
    Positions,
    align,
    corrupt,
    nid,
    pool,
    rcl,
    total,
)
from trainer.losses.registry import LOSSES
from trainer.models.base import Catalogue, Pretraining
from trainer.models.causal import CausalRecommender, CausalSettings
from trainer.models.released import RELEASED_ATTENTION, RELEASED_ENCODER
from trainer.modules.chunked_encoding import recomputed
from trainer.modules.fusion import FusionSettings
from trainer.modules.item_encoder import EncodedItems, ItemEncoder
from trainer.modules.registry import FUSIONS
from trainer.modules.released_weights import InitialisationSettings, initialise_released
from trainer.modules.sequence_encoders import SASRecEncoder, take_slots
from trainer.modules.transformer import initialise

_PUBLISHED: Mapping[str, Any] = {
    **RELEASED_ENCODER,
    **RELEASED_ATTENTION,
    "token_types": False,
    "pool": "cls",
    "align_pool": "cls",
    "score": "dot",
    "temperature": 1.0,
    "exclude": "window",
    "debias": False,
    "align_temperature": 1.0,
    "rcl_cosine": False,
    "rcl_temperature": 1.0,
    "tune_blocks": 2,
    "tune_lr": 1e-4,
    "lr": 1e-4,
    "weight_decay": 0.1,
    "clip": 0.0,
    "monitor": "HR@10",
}
"""The equations and section IV of the paper. With a temperature of 1, Eq. 8 as printed
(``align_literal=true``) can have a negative loss, so the positives stay in the denominator."""
_RELEASED: Mapping[str, Any] = {"pool": "mean", "align_pool": "mean", "debias": True}


@dataclass(frozen=True, kw_only=True)
class PMMRecConfig(CausalSettings, FusionSettings, InitialisationSettings):
    """Settings of PMMRec. The descriptions name the values of the paper and the released code."""

    dim: PositiveInt = 256
    """Width of tokens, item vectors and states (the paper: 768)."""
    fusion: Annotated[str, Choice("fusion", FUSIONS)] = "merge-attention"
    """Fusion of the modalities (the paper: ``merge-attention``)."""
    dap: bool = True
    """Train on next-item prediction with ``loss``."""
    loss: Annotated[str, Choice("loss", LOSSES)] = "in-batch"
    """Loss of the next item; ``in-batch`` is DAP (Eq. 5)."""
    score: Annotated[str, Choice("score", SCORES)] = "cosine"
    """``dot``: inner product (the paper); ``scaled``: inner product / sqrt(``dim``) in the loss, so
    that initial scores are of equal size at any width; ``cosine``: vectors of length 1. The first
    two learn slowly."""
    temperature: Temperature = 0.07
    """Divisor of the scores in the loss (the paper: 1)."""
    align: Annotated[str, Choice("align", ("none", *ALIGNMENTS))] = "none"
    """Contrastive loss of the modalities: ``none``, ``vcl``, ``icl``, ``ncl`` or ``nicl``."""
    align_pool: Annotated[str, Choice("align_pool", ("mean", "cls"))] = "mean"
    """Vector of a modality in that loss, and of an item with a single modality: the ``mean`` of its
    tokens, or its first token, which is the ``cls`` token of most backbones (Eq. 6 to 9)."""
    align_temperature: Temperature = 0.1
    """Divisor of the cosines in the contrastive loss of the modalities (the equations: 1)."""
    align_literal: bool = False
    """Use Eq. 8 as printed, without the positives of the next item in the denominator."""
    nid: bool = False
    """Train to detect which items of a corrupted sequence are shuffled or replaced."""
    nid_relu: bool = False
    """Clip the logits of NID at 0 before the softmax: the trainable form closest to Eq. 10."""
    rcl: bool = False
    """Train to match a sequence with its corrupted copy."""
    rcl_pool: Annotated[str, Choice("rcl_pool", ("mean", "last"))] = "mean"
    """Vector of a sequence in RCL: the ``mean`` of its states, or the ``last`` state."""
    rcl_cosine: bool = True
    """Compare sequences in RCL by cosine. As published: false, by inner product."""
    rcl_temperature: Temperature = 0.1
    """Divisor of the scores in RCL (as published: 1)."""
    shuffle: Probability = 0.15
    """Share of a sequence's items that corruption moves."""
    replace: Probability = 0.05
    """Share of a sequence's items that corruption replaces by other items of the batch."""

    def check(self) -> None:
        """Raise a UserError unless at least one objective is switched on."""
        super().check()
        if not (self.dap or self.align != "none" or self.nid or self.rcl):
            raise UserError(
                "nothing to learn: dap, nid and rcl are false and align is none; set one of them"
            )


class PMMRec(CausalRecommender):
    """A multimodal item encoder and a causal user encoder, on all modalities that have features.

    Raises:
        UserError: There are no features, or ``align`` is set and there is only one modality.
    """

    settings_class = PMMRecConfig
    settings: PMMRecConfig
    needs_features = True
    reads_tokens = True
    pretraining = Pretraining(
        task="next-item",
        settings={"align": "nicl", "nid": True, "rcl": True},
        presets={"published": {**_PUBLISHED, "batch_size": 512}},
    )
    presets: ClassVar = {"published": _PUBLISHED, "released": {**_PUBLISHED, **_RELEASED}}
    variants: ClassVar = {
        "published, pooled vectors": "--preset published --tune-blocks 0",
        "top blocks fine-tuned": "--set tune_blocks=2, tables layer-K, K = blocks - 2",
        "Table VIII": "--set align=none|vcl|icl|ncl, --set nid=false, --set rcl=false",
        "the paper's item (Eq. 3)": "--set pool=cls",
        "the released code's item": "--set token_types=false",
        "the paper's DAP (Eq. 5)": "--set debias=false",
        "NICL as printed (Eq. 8)": "--set align_temperature=1 --set align_literal=true",
        "NID as printed (Eq. 10)": "--set nid_relu=true",
        "RCL as printed (Eq. 11)": "--set rcl_cosine=false --set rcl_temperature=1",
    }
    transfer_groups: ClassVar = {
        "items": ("item_encoder.", "backbones."),
        "users": ("sequence_encoder.",),
        **{
            name: (f"item_encoder.inputs.{name}.", f"backbones.{name}.", "sequence_encoder.")
            for name in ("text", "image", "video")
        },
    }
    modality_tables = ("item_encoder.absent", "item_encoder.fusion.types")
    item_encoder: ItemEncoder

    def __init__(self, settings: PMMRecConfig, catalogue: Catalogue) -> None:
        super().__init__(settings, catalogue)
        if not catalogue.widths:
            raise UserError(
                "pmmrec needs features; run mmrec extract for this dataset, or train sasrec"
            )
        if settings.align != "none" and len(catalogue.widths) < 2:
            raise UserError(
                f"align={settings.align!r} contrasts modalities, and the only modality is"
                f" {', '.join(catalogue.widths)}; set align=none"
            )
        self.item_encoder = ItemEncoder(
            settings.fusion, settings, catalogue.widths, modality_pool=settings.align_pool
        )
        self.sequence_encoder = SASRecEncoder(settings, settings.dropout)
        if settings.nid:
            self.nid = nn.Linear(settings.dim, 3)
        if settings.initialisation == "released":
            initialise_released(self)
        else:
            initialise(self)
        if not (settings.dap or settings.nid or settings.rcl):  # alignment uses neither of the two
            self.sequence_encoder.requires_grad_(False)
            self.item_encoder.fusion.requires_grad_(False)
        # Added after the initialisation, so that the backbones keep their pre-trained weights.
        self.backbones = nn.ModuleDict(dict(catalogue.backbones))

    def fit_buffers(self, features: ItemFeatures, train: TrainSet) -> None:
        """With ``centre``, fit the centring of pooled features on the items of the training."""
        self.item_encoder.fit(features, train)

    def encode_some(self, items_K: Tensor, features: ItemFeatures) -> Tensor:
        """Encode the given items from their features: (K, D)."""
        return self._encode(items_K, features).fused_KD

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return each objective that is switched on, and their sum as ``loss`` (Eq. 12)."""
        settings = self.settings
        inputs, targets, slot_M = self.targets(batch)
        drawn = self.next_item_loss.draw(targets, batch) if settings.dap else None
        ids_K = batch.distinct_items(None if drawn is None else drawn.on_host.items_X)
        encoded = self._encode(ids_K, batch.features)
        items = ItemVectors(vectors_KD=settings.normalise(encoded.fused_KD), ids_K=ids_K)
        losses: dict[str, Tensor] = {}
        if settings.dap or settings.rcl:
            state_BLD = self.states(items, inputs)
        if settings.dap:
            scored = items
            if self.next_item_loss.needs_catalogue:
                scored = ItemVectors(vectors_KD=self.encode_items(batch.features))
            query_MD = settings.normalise(take_slots(state_BLD, slot_M))
            losses["dap"] = self.next_item_loss(query_MD, scored, targets, batch, drawn)
        if settings.align != "none":
            losses[settings.align] = self._alignment(batch, encoded, ids_K)
        if settings.nid or settings.rcl:
            corrupted = corrupt(
                inputs.on_host.items_BL,
                inputs.on_host.lengths_B,
                batch.generator,
                shuffle=settings.shuffle,
                replace=settings.replace,
            )
            noisy_BL, label_BL = (to_device(x, batch.device) for x in corrupted)
            noisy = Sequences(items_BL=noisy_BL, lengths_B=inputs.lengths_B)
            noisy_BLD = self.states(items, noisy)
        if settings.nid:
            logits_M3 = self.nid(take_slots(noisy_BLD, slot_M))
            losses["nid"] = nid(logits_M3, take_slots(label_BL, slot_M), relu=settings.nid_relu)
        if settings.rcl:
            losses["rcl"] = rcl(
                self._pooled(state_BLD, inputs.lengths_B),
                self._pooled(noisy_BLD, inputs.lengths_B),
                batch.users_B,
                scale=1 / settings.rcl_temperature,
            )
        return total(losses)

    def _encode(self, items_K: Tensor, features: ItemFeatures) -> EncodedItems:
        def encode(chunk_K: Tensor) -> EncodedItems:
            encoded: EncodedItems = self.item_encoder(
                item_tokens(chunk_K, features, self.backbones)
            )
            return encoded

        if self.chunks == 1 or not torch.is_grad_enabled():
            return encode(items_K)
        return EncodedItems.concatenate(recomputed(encode, self.chunks, items_K))

    def _alignment(self, batch: Batch, encoded: EncodedItems, ids_K: Tensor) -> Tensor:
        """Return the contrastive loss of the modalities of the items of the batch (Eq. 6 to 9)."""
        windows = batch.sequences.on_host
        anchors, following = (
            targets_at(windows.mask_BL[:, 1:], items_BL)[0].to(batch.device)
            for items_BL in (windows.items_BL[:, :-1], windows.items_BL[:, 1:])
        )
        begin = rank_offset(len(ids_K))
        positions = Positions(
            item_C=gather_ids(ids_K),
            count_C=gather_ids(count_items(ids_K, batch)),
            anchor_M=begin + torch.searchsorted(ids_K, anchors.item_M),
            next_M=begin + torch.searchsorted(ids_K, following.item_M),
            own_UJ=own_items(batch, self.settings.exclude),
            owner_M=anchors.on_host.row_M,
            has_modality=[
                batch.features.present_on_host[name][anchors.on_host.item_M]
                for name in self.item_encoder.inputs
            ],
        )
        modalities = [
            (gather_rows(x_KD), gather_ids(has_K)) for x_KD, has_K in encoded.modality_vectors()
        ]
        return align(
            self.settings.align,
            modalities,
            positions,
            scale=1 / self.settings.align_temperature,
            literal=self.settings.align_literal,
        )

    def _pooled(self, state_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        pooled_BD = pool(state_BLD, lengths_B, self.settings.rcl_pool)
        return functional.normalize(pooled_BD, dim=-1) if self.settings.rcl_cosine else pooled_BD
