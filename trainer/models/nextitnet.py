"""NextItNet (Yuan et al., WSDM 2019): dilated causal convolutions over learned item vectors.

The model predicts the item after each position of a window, as in the paper. Its residual blocks
are those of Figure 3b, with the dilations 1, 2, 4 and 8 in turn. RecBole reads the state after the
padding of a sequence and penalises unsquared norms; mmrec reads the state after the last item and
uses the weight decay of AdamW.
"""

from dataclasses import dataclass
from typing import ClassVar

from trainer.config import LayerCount, NormEpsilon, PositiveInt, Probability
from trainer.models.base import Catalogue
from trainer.models.causal import CausalSettings
from trainer.models.item_ids import ItemIdRecommender
from trainer.models.sasrec import SASRec
from trainer.modules.sequence_encoders import NextItNetEncoder
from trainer.modules.transformer import initialise


@dataclass(frozen=True, kw_only=True)
class NextItNetConfig(CausalSettings):
    """Settings of NextItNet."""

    dim: PositiveInt = 64
    layers: LayerCount = 2
    """Number of pairs of residual blocks. Each pair has the dilations 1 and 2, then 4 and 8."""
    length: PositiveInt = 50
    dropout: Probability = 0.3
    """Dropout probability of the item vectors (the paper: 0)."""
    norm_eps: NormEpsilon = 1e-8
    """Epsilon of the LayerNorms."""


class NextItNet(ItemIdRecommender):
    """Residual blocks of dilated convolutions over item ids."""

    settings_class = NextItNetConfig
    settings: NextItNetConfig
    unread = (
        "heads",
        "hidden",
        "activation",
        "final_norm",
        "attention_bias",
        "inner_dropout",
    )
    train_defaults: ClassVar = SASRec.train_defaults
    presets: ClassVar = {
        "published": {
            "layers": 5,
            "dropout": 0.0,
            "lr": 1e-3,  # this and what follows: the optimizer of RecBole
            "schedule": "constant",
            "epochs": 300,
            "weight_decay": 0.0,
            "clip": 0.0,
        }
    }

    def __init__(self, settings: NextItNetConfig, catalogue: Catalogue) -> None:
        super().__init__(settings, catalogue)
        self.sequence_encoder = NextItNetEncoder(settings, attention_dropout=0.0)
        initialise(self)
