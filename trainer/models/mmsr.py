"""MMSR: modalities, a fusion and a causal sequence encoder; and IDSR, the same over item ids.

Li et al., "An Empirical Study of Training ID-Agnostic Multi-modal Sequential Recommenders". An
item's modalities are fused into one vector (:mod:`trainer.modules.item_encoder`), a causal encoder
reads the vectors of a history (:mod:`trainer.modules.sequence_encoders`), and a score is an inner
product. ``idsr`` is the paper's counterpart, with a learned vector for each item.

The paper trains with the binary cross-entropy and one sampled negative; mmrec adds the softmax over
the batch and over the catalogue. The item encoder reads pooled vectors or token tables. The blocks
of a backbone above a ``layer-K`` table can be trained, see :mod:`trainer.finetune.upper_blocks`.

Legend: K distinct items, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import Tensor, nn

from features.errors import UserError
from trainer.config import Choice, PositiveInt, Temperature
from trainer.data.batches import ItemFeatures, TrainSet
from trainer.finetune.upper_blocks import item_tokens
from trainer.losses.base import SCORES
from trainer.losses.registry import LOSSES
from trainer.models.base import Catalogue
from trainer.models.causal import CausalRecommender, CausalSettings
from trainer.models.released import RELEASED_ATTENTION, RELEASED_COARSE, RELEASED_ENCODER
from trainer.modules.fusion import FusionSettings
from trainer.modules.item_encoder import EncodedItems, ItemEncoder
from trainer.modules.registry import FUSIONS, SEQUENCE_ENCODERS
from trainer.modules.released_weights import InitialisationSettings, initialise_released
from trainer.modules.transformer import initialise_glorot

PUBLISHED: Mapping[str, Any] = {
    **RELEASED_ENCODER,
    "loss": "bce",
    "score": "dot",
    "temperature": 1.0,
    "lr": 1e-4,
    "weight_decay": 0.1,
    "batch_size": 512,
    "epochs": 150,
    "patience": 150,
    "validate_every": 5,
    "clip": 0.0,
    "schedule": "linear",
    "decay_from": 120,
    "decay_to": 0.1,
    "monitor": "HR@10",
}
"""Section 4.2 of the paper, and 64 sequences on each of 8 devices, as released; training does not
stop early."""
RELEASED_SCHEDULE: Mapping[str, Any] = {"schedule": "step", "decay": 0.1}
# The results in Tables III, XI, XIII and XIV are those of Table XII with 1e-4 for all modules.
_TUNED = {"tune_blocks": 2, "tune_lr": 1e-4}
_MERGE = {**RELEASED_ATTENTION, "token_types": False, **_TUNED}
_CO_ATTENTION = {**RELEASED_ATTENTION, "fusion": "co-attention", "token_types": True, **_TUNED}
_COARSE = {**RELEASED_COARSE, "fusion": "sum", **_TUNED}


@dataclass(frozen=True, kw_only=True)
class IDSRConfig(CausalSettings, InitialisationSettings):
    """Settings of a sequence encoder over one vector for each item."""

    dim: PositiveInt = 256
    """Width of item vectors and states (the paper: 768)."""
    sequence_encoder: Annotated[str, Choice("sequence encoder", SEQUENCE_ENCODERS)] = "sasrec"
    """``sasrec``, ``gru`` or ``nextitnet`` (in the paper with 2, 4 and 2 layers)."""
    loss: Annotated[str, Choice("loss", LOSSES)] = "in-batch"
    """Next-item loss: ``bce`` with one sampled negative (the paper), ``in-batch`` over the items of
    the batch, ``softmax`` over the catalogue."""
    score: Annotated[str, Choice("score", SCORES)] = "cosine"
    """``dot``: inner product (the paper); ``scaled``: inner product / sqrt(``dim``) in the loss, so
    that initial scores are of equal size at any width; ``cosine``: vectors of length 1. The first
    two learn slowly."""
    temperature: Temperature = 0.07
    """Divisor of the scores in the loss (the paper: 1)."""


class IDSR(CausalRecommender):
    """A learned vector for each item, and a causal sequence encoder."""

    settings_class: ClassVar[type[Any]] = IDSRConfig
    settings: IDSRConfig
    item_tables: ClassVar[tuple[str, ...]] = ("item_encoder.",)
    presets: ClassVar = {"published": PUBLISHED, "released": {**PUBLISHED, **RELEASED_SCHEDULE}}

    def __init__(self, settings: IDSRConfig, catalogue: Catalogue) -> None:
        super().__init__(settings, catalogue)
        self.item_encoder = self._item_encoder(catalogue)
        self.sequence_encoder = SEQUENCE_ENCODERS.find(settings.sequence_encoder)(
            settings, settings.dropout
        )
        if settings.initialisation == "released":
            initialise_released(self)
        else:
            initialise_glorot(self)
        # Added after the initialisation, so that the backbones keep their pre-trained weights.
        self.backbones = nn.ModuleDict(dict(catalogue.backbones))

    def _item_encoder(self, catalogue: Catalogue) -> nn.Module:
        return nn.Embedding(catalogue.n_items, self.settings.dim)

    def row_tables(self) -> list[nn.Embedding]:
        """Return the table of item vectors if the loss reads a part of it."""
        tables = [self.item_encoder] if isinstance(self.item_encoder, nn.Embedding) else []
        return [] if self.next_item_loss.needs_catalogue else tables

    def encode_some(self, items_K: Tensor, features: ItemFeatures) -> Tensor:
        """Return the learned vectors of the given items: (K, D)."""
        vectors_KD: Tensor = self.item_encoder(items_K)
        return vectors_KD


@dataclass(frozen=True, kw_only=True)
class MMSRConfig(IDSRConfig, FusionSettings):
    """Settings of MMSR. The descriptions name the values of the paper and the released code."""

    fusion: Annotated[str, Choice("fusion", FUSIONS)] = "merge-attention"
    """``sum``, ``concat``, ``gate``, ``film``, ``co-attention`` or ``merge-attention``; ignored
    with a single modality."""


class MMSR(IDSR):
    """A fusion of the modalities that have features, and a causal sequence encoder.

    The modalities are text, image, video, and joint vectors of image and text.

    Raises:
        UserError: There are no features, or too many modalities for the fusion.
    """

    settings_class = MMSRConfig
    settings: MMSRConfig
    needs_features: ClassVar[bool] = True
    reads_tokens: ClassVar[bool] = True
    presets: ClassVar = {
        "published": {**PUBLISHED, **_MERGE},
        "published-co-attention": {**PUBLISHED, **_CO_ATTENTION},
        "published-coarse": {**PUBLISHED, **_COARSE},
        "released": {**PUBLISHED, **_MERGE, **RELEASED_SCHEDULE},
    }
    variants: ClassVar = {
        "from item ids": "mmrec train --model idsr",
        "published, pooled vectors": "--preset published --tune-blocks 0",
        "other coarse fusions": "--preset published-coarse --set fusion=concat|gate|film",
        "GRU of the paper": "--set sequence_encoder=gru --set layers=4",
        "NextItNet as released": "--set sequence_encoder=nextitnet --set norm_eps=1e-8",
        "top blocks fine-tuned": "--set tune_blocks=2, tables layer-K, K = blocks - 2",
    }
    item_tables: ClassVar[tuple[str, ...]] = ()
    modality_tables = ("item_encoder.absent", "item_encoder.fusion.types")
    transfer_groups: ClassVar = {
        **IDSR.transfer_groups,
        "items": ("item_encoder.", "backbones."),
        **{
            name: (
                f"item_encoder.inputs.{name}.",
                f"backbones.{name}.",
                "item_encoder.absent",
                "item_encoder.fusion.",
                "item_encoder.dnn.",
                "sequence_encoder.",
            )
            for name in ("text", "image")
        },
    }

    def _item_encoder(self, catalogue: Catalogue) -> nn.Module:
        if not catalogue.widths:
            raise UserError(
                "mmsr needs features; run mmrec extract for this dataset, or train idsr"
            )
        return ItemEncoder(self.settings.fusion, self.settings, catalogue.widths)

    def fit_buffers(self, features: ItemFeatures, train: TrainSet) -> None:
        """With ``centre``, fit the centring of pooled features on the items of the training."""
        assert isinstance(self.item_encoder, ItemEncoder)
        self.item_encoder.fit(features, train)

    def encode_some(self, items_K: Tensor, features: ItemFeatures) -> Tensor:
        """Encode the given items from their features: (K, D)."""
        items: EncodedItems = self.item_encoder(item_tokens(items_K, features, self.backbones))
        return items.fused_KD
