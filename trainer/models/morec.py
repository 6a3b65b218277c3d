"""MoRec++: encoders of texts and images under SASRec (MoRec, Yuan et al., SIGIR 2023).

MoRec replaces the learned item vector of SASRec by the output of a modality encoder, followed by a
linear layer and GELU, and trains both together. PMMRec and MMSR compare with MoRec++, where text
and image are fused before SASRec. Neither paper says how: here the vectors of the modalities are
concatenated and mapped by a linear layer. A learned vector replaces a modality that an item lacks.

The frozen lower blocks of the encoders are a ``layer-K`` table, the upper blocks are trained with
``tune_blocks`` (:mod:`trainer.finetune.upper_blocks`). On pooled vectors the model is the two-stage
form of MoRec. The loss is the in-batch softmax, debiased by popularity. Pre-training
(``mmrec pretrain``) has the same loss, on the histories of several datasets (PMMRec, Table IV). The
equations were checked against westlake-repl/IDvs.MoRec, ce372cf; no code of MoRec++ is released.

Legend: K distinct items, T tokens, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.config import Choice, PositiveInt
from trainer.data.batches import ItemFeatures
from trainer.finetune.upper_blocks import item_tokens
from trainer.losses.registry import LOSSES
from trainer.models.base import Catalogue, Pretraining
from trainer.models.causal import CausalRecommender, CausalSettings
from trainer.models.item_features import check_features
from trainer.models.released import RELEASED_ENCODER
from trainer.modules.fusion import learned
from trainer.modules.released_weights import InitialisationSettings, initialise_released
from trainer.modules.sequence_encoders import SASRecEncoder
from trainer.modules.tokens import Tokens, averaged
from trainer.modules.transformer import initialise_glorot

_PUBLISHED: Mapping[str, Any] = {
    **RELEASED_ENCODER,
    "token": "first",
    "exclude": "window",
    "weight_decay": 0.01,
}
"""The runs of PMMRec; MoRec alone has the width 512 with texts and 2048 with images."""


@dataclass(frozen=True, kw_only=True)
class MoRecConfig(CausalSettings, InitialisationSettings):
    """Settings of MoRec++."""

    dim: PositiveInt = 256
    """Width of item vectors and states (MoRec: 512 with texts, 2048 with images; PMMRec's runs:
    768)."""
    loss: Annotated[str, Choice("loss", LOSSES)] = "in-batch"
    """Next-item loss: ``in-batch`` over the items of the batch, ``bce`` with one sampled negative
    (both published), ``softmax`` over the catalogue."""
    token: Annotated[str, Choice("token", ("mean", "first"))] = "mean"
    """With a table of tokens, the vector of an item: the ``mean`` of its tokens, or the ``first``
    token (published, with encoders whose first token is CLS)."""


class MoRec(CausalRecommender):
    """A linear layer and GELU on each modality, a concatenation, and SASRec.

    Raises:
        UserError: There are no features.
    """

    settings_class = MoRecConfig
    settings: MoRecConfig
    needs_features = True
    reads_tokens = True
    train_defaults: ClassVar = {"lr": 1e-4, "monitor": "Recall@10"}
    presets: ClassVar = {"published": _PUBLISHED}
    pretraining = Pretraining(
        task="next-item",
        settings={"batch_size": 512},
        presets={"published": {**_PUBLISHED, "batch_size": 512}},
    )
    variants: ClassVar = {
        "top blocks fine-tuned": "--set tune_blocks=2, tables layer-K, K = blocks - 2",
        "binary cross-entropy": "--set loss=bce",
        "text alone or images alone (MoRec)": "--features text, or --features image",
    }
    modality_tables = ("item_encoder.absent",)
    transfer_groups: ClassVar = {
        "items": ("item_encoder.", "backbones."),
        "users": ("sequence_encoder.",),
        **{
            name: (f"item_encoder.inputs.{name}.", f"backbones.{name}.", "sequence_encoder.")
            for name in ("text", "image", "video")
        },
    }

    def __init__(self, settings: MoRecConfig, catalogue: Catalogue) -> None:
        super().__init__(settings, catalogue)
        check_features("morec", catalogue)
        self.item_encoder = _ItemEncoder(settings, catalogue.widths)
        self.sequence_encoder = SASRecEncoder(settings, settings.dropout)
        if settings.initialisation == "released":
            initialise_released(self)
        else:
            initialise_glorot(self)
        # Added after the initialisation, so that the backbones keep their pre-trained weights.
        self.backbones = nn.ModuleDict(dict(catalogue.backbones))

    def encode_some(self, items_K: Tensor, features: ItemFeatures) -> Tensor:
        """Encode the given items from their features: (K, D)."""
        vectors_KD: Tensor = self.item_encoder(item_tokens(items_K, features, self.backbones))
        return vectors_KD


class _ItemEncoder(nn.Module):
    def __init__(self, settings: MoRecConfig, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.reads_first = settings.token == "first"
        self.inputs = nn.ModuleDict(
            {name: nn.Linear(width, settings.dim) for name, width in widths.items()}
        )
        self.absent = learned(len(widths), settings.dim)
        self.fusion = (
            nn.Linear(len(widths) * settings.dim, settings.dim)
            if len(widths) > 1
            else nn.Identity()
        )

    def forward(self, features: Mapping[str, Tokens]) -> Tensor:
        """Return the item vectors: (K, D)."""
        encoded = []
        for number, (name, project) in enumerate(self.inputs.items()):
            x_KTD, mask_KT = features[name]
            if self.reads_first:
                x_K1D = x_KTD[:, :1]
            else:
                x_K1D, _ = averaged(x_KTD, mask_KT)
            mapped_KD = functional.gelu(project(x_K1D[:, 0]))
            encoded.append(
                torch.where(mask_KT.any(1, keepdim=True), mapped_KD, self.absent[number])
            )
        fused_KD: Tensor = self.fusion(torch.cat(encoded, dim=-1))
        return fused_KD
