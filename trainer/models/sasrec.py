"""SASRec (Kang and McAuley, ICDM 2018): self-attention over learned item vectors.

The model differs from the paper where later work found the paper's choice to be weaker: a softmax
over the catalogue instead of one sampled negative (Klenitskiy and Vasilev, RecSys 2023), windows
over the whole history, and BERT's order of layers (a LayerNorm on the embedded items, post-LN
blocks, GELU). ``score=cosine`` trains on cosines, as MMSRec does. Attention weights have no
dropout: on ml-100k it did not improve validation, and without it attention needs no L x L matrix.
"""

from dataclasses import dataclass
from typing import ClassVar

from trainer.config import LayerCount, PositiveInt, Probability
from trainer.models.base import Catalogue
from trainer.models.causal import CausalSettings
from trainer.models.item_ids import ItemIdRecommender
from trainer.modules.sequence_encoders import SASRecEncoder
from trainer.modules.transformer import initialise


@dataclass(frozen=True, kw_only=True)
class SASRecConfig(CausalSettings):
    """Settings of SASRec."""

    dim: PositiveInt = 64
    layers: LayerCount = 2
    heads: PositiveInt = 2
    hidden: PositiveInt = 256
    length: PositiveInt = 50
    dropout: Probability = 0.4


class SASRec(ItemIdRecommender):
    """Self-attentive sequential recommendation over item ids."""

    settings_class = SASRecConfig
    settings: SASRecConfig
    # Chosen on the validation split of ml-100k.
    train_defaults: ClassVar = {
        "lr": 2e-3, "epochs": 40, "schedule": "cosine", "monitor": "NDCG@10",
    }  # fmt: skip
    variants: ClassVar = {"on cosines, as mmsrec": "--set score=cosine --set temperature=0.07"}

    def __init__(self, settings: SASRecConfig, catalogue: Catalogue) -> None:
        super().__init__(settings, catalogue)
        self.sequence_encoder = SASRecEncoder(settings, attention_dropout=0.0)
        initialise(self)
