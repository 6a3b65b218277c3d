"""SASRec (Kang and McAuley, ICDM 2018): self-attention over learned item vectors.

The model differs from the paper where later work found the paper's choice to be weaker: a softmax
over the catalogue instead of one sampled negative (Klenitskiy and Vasilev, RecSys 2023), windows
over the whole history, and BERT's order of layers (a LayerNorm on the embedded items, post-LN
blocks, GELU). ``score=cosine`` trains on cosines, as MMSRec does. Attention weights have no
dropout: on ml-100k it did not improve validation, and without it attention needs no L x L matrix.
``--preset published`` is the paper, ``--preset released`` the code of its authors.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import nn

from trainer.config import Choice, LayerCount, PositiveInt, Probability
from trainer.models.base import Catalogue
from trainer.models.causal import CausalSettings
from trainer.models.item_ids import ItemIdRecommender
from trainer.modules.pre_norm import PreNormEncoder
from trainer.modules.sequence_encoders import SASRecEncoder
from trainer.modules.transformer import initialise

BLOCKS = ("post-ln", "pre-ln", "released")
"""Values of the setting ``block``."""
_PAPER: dict[str, Any] = {
    "block": "pre-ln",
    "dim": 50,
    "hidden": 50,
    "heads": 1,
    "activation": "relu",
    "norm_eps": 1e-8,
    "dropout": 0.5,
    "loss": "bce",
    "batch_size": 128,
    "lr": 1e-3,
    "epochs": 200,
    "schedule": "constant",
    "weight_decay": 0.0,
    "clip": 0.0,
    "patience": 20,
}
"""Section 4.3 of the paper, for the datasets of Amazon and Steam."""


@dataclass(frozen=True, kw_only=True)
class SASRecConfig(CausalSettings):
    """Settings of SASRec."""

    dim: PositiveInt = 64
    layers: LayerCount = 2
    heads: PositiveInt = 2
    hidden: PositiveInt = 256
    length: PositiveInt = 50
    dropout: Probability = 0.4
    block: Annotated[str, Choice("block", BLOCKS)] = "post-ln"
    """Order of the layers: ``post-ln`` (BERT); ``pre-ln``, the paper's; ``released``, that of the
    code of the paper's authors, see :mod:`trainer.modules.pre_norm`."""


class SASRec(ItemIdRecommender):
    """Self-attentive sequential recommendation over item ids."""

    settings_class = SASRecConfig
    settings: SASRecConfig
    # Chosen on the validation split of ml-100k.
    train_defaults: ClassVar = {
        "lr": 2e-3, "epochs": 40, "schedule": "cosine", "monitor": "NDCG@10",
    }  # fmt: skip
    presets: ClassVar = {
        "published": _PAPER,
        "published-ml-1m": {**_PAPER, "dropout": 0.2, "length": 200},
        "released": {**_PAPER, "block": "released", "epochs": 201, "validate_every": 20},
    }
    variants: ClassVar = {"on cosines, as mmsrec": "--set score=cosine --set temperature=0.07"}

    def __init__(self, settings: SASRecConfig, catalogue: Catalogue) -> None:
        super().__init__(settings, catalogue)
        if settings.block == "post-ln":
            self.sequence_encoder = SASRecEncoder(settings, attention_dropout=0.0)
            initialise(self)
            return
        self.sequence_encoder = PreNormEncoder(settings, released=settings.block == "released")
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                nn.init.xavier_uniform_(part.weight)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)
