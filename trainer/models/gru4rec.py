"""GRU4Rec (Hidasi et al., ICLR 2016): a recurrent network over learned item vectors.

A GRU reads the item vectors, and a linear layer maps its states to the width of the item vectors
(section 3.1 of the paper; the GRU has no biases and is wider than the item vectors, as in RecBole).

The paper trains on sessions in parallel, with the pairwise losses TOP1 and BPR over the other items
of the batch. mmrec trains on windows with a softmax over the catalogue, which RecBole uses as well.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from trainer.config import LayerCount, PositiveInt, Probability
from trainer.kernels.elementwise import dropout
from trainer.models.base import Catalogue
from trainer.models.causal import CausalSettings
from trainer.models.item_ids import ItemIdRecommender
from trainer.models.sasrec import SASRec
from trainer.modules.sequence_encoders import SequenceEncoder
from trainer.modules.transformer import initialise


@dataclass(frozen=True, kw_only=True)
class GRU4RecConfig(CausalSettings):
    """Settings of GRU4Rec."""

    dim: PositiveInt = 64
    hidden: PositiveInt = 128
    """Width of the GRU."""
    layers: LayerCount = 1
    length: PositiveInt = 50
    dropout: Probability = 0.3
    """Dropout probability of the item vectors."""


class GRU4Rec(ItemIdRecommender):
    """A GRU over item ids."""

    settings_class = GRU4RecConfig
    settings: GRU4RecConfig
    unread = (
        "heads",
        "activation",
        "final_norm",
        "attention_bias",
        "norm_eps",
        "inner_dropout",
    )
    train_defaults: ClassVar = SASRec.train_defaults

    def __init__(self, settings: GRU4RecConfig, catalogue: Catalogue) -> None:
        super().__init__(settings, catalogue)
        self.sequence_encoder = _Encoder(settings)
        initialise(self)
        for parameter in self.sequence_encoder.gru.parameters():
            nn.init.xavier_uniform_(parameter)


class _Encoder(SequenceEncoder):
    def __init__(self, settings: GRU4RecConfig) -> None:
        super().__init__(settings, attention_dropout=0.0)
        self.gru = nn.GRU(
            settings.dim, settings.hidden, settings.layers, bias=False, batch_first=True
        )
        self.out = nn.Linear(settings.hidden, settings.dim)

    def forward(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the state after each item: (B, L, D)."""
        hidden_BLH, _ = self.gru(dropout(x_BLD, self.settings.dropout, self.training))
        states_BLD: Tensor = self.out(hidden_BLH)
        return states_BLD
