"""The base class of UniSRec and VQ-Rec: text models that are pre-trained on several datasets.

Both read histories with SASRec, score by cosines, pre-train by a contrast within the batch
(``objective=contrast``, the default of ``mmrec pretrain``), and are fine-tuned by a softmax over
the catalogue (``objective=next``).

Legend: M predicted positions, C columns, D width.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from trainer.config import Choice, PositiveInt, Probability, Temperature
from trainer.data.batches import Batch
from trainer.data.device_copy import to_device
from trainer.losses.base import SCORES, ItemVectors, Targets
from trainer.models.base import Catalogue, Pretraining
from trainer.models.causal import CausalSettings
from trainer.models.item_features import FeatureRecommender
from trainer.modules.sequence_encoders import SASRecEncoder

RECBOLE: Mapping[str, Any] = {
    "rows": "prefixes",
    "inner_dropout": False,
    "final_norm": False,
    "norm_eps": 1e-12,
    "weight_decay": 0.0,
    "clip": 0.0,
    "batch_size": 2048,
    "epochs": 300,
}
"""Rows, sequence encoder and optimizer of RecBole, which the released code of UniSRec, VQ-Rec and
TedRec uses; RecBole has the code of FDSA."""


@dataclass(frozen=True, kw_only=True)
class TextTransferSettings(CausalSettings):
    """Settings of UniSRec and VQ-Rec. The defaults are the published settings."""

    dim: PositiveInt = 300
    hidden: PositiveInt = 256
    length: PositiveInt = 50
    dropout: Probability = 0.5
    score: Annotated[str, Choice("score", SCORES)] = "cosine"
    temperature: Temperature = 0.07
    objective: Annotated[str, Choice("objective", ("next", "contrast"))] = "next"
    """``next``: the next-item loss ``loss`` (fine-tuning); ``contrast``: the contrastive losses of
    the pre-training."""
    freeze: bool = False
    """Keep the positions and the transformer of the sequence encoder as they are copied from a
    pre-trained run (``--init``), and train the other weights. As published: true."""


class TextTransferRecommender(FeatureRecommender):
    """SASRec over items that are encoded from features, pre-trained by a contrast."""

    settings: TextTransferSettings
    train_defaults: ClassVar = {"batch_size": 256, "monitor": "NDCG@10"}
    presets: ClassVar = {"published": RECBOLE}
    of_given_weights: ClassVar[tuple[str, ...]] = ("freeze",)
    pretraining = Pretraining(
        task="next-item",
        settings={"objective": "contrast", "batch_size": 2048},
        presets={"published": {**RECBOLE, "batch_size": 8192}},
    )

    def __init__(self, settings: TextTransferSettings, catalogue: Catalogue) -> None:
        super().__init__(settings, catalogue)
        self.sequence_encoder = SASRecEncoder(settings, settings.dropout)
        if settings.freeze:
            self.sequence_encoder.position.requires_grad_(False)
            self.sequence_encoder.transformer.requires_grad_(False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss of ``objective``."""
        return (
            self.contrast(batch) if self.settings.objective == "contrast" else super().loss(batch)
        )

    @abstractmethod
    def contrast(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of the pre-training by name, with their weighted sum as ``loss``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetColumns:
    """The distinct targets of a batch, as the columns of an in-batch softmax."""

    items: ItemVectors
    """Vectors of the C columns."""
    counts_C: Tensor
    """(C,) the number of positions that have the target."""

    @classmethod
    def of(cls, items: ItemVectors, targets: Targets) -> "TargetColumns":
        """Select the vectors of the distinct targets."""
        distinct = targets.on_host.item_M.unique(return_counts=True)
        ids_C, counts_C = (to_device(x, targets.item_M.device) for x in distinct)
        columns = ItemVectors(vectors_KD=items.gather(ids_C), ids_K=ids_C)
        return cls(items=columns, counts_C=counts_C)

    @property
    def ids_C(self) -> Tensor:
        """(C,) the items of the columns, ascending."""
        assert isinstance(self.items.ids_K, torch.Tensor)
        return self.items.ids_K
