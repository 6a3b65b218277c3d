"""GRU4Rec (Hidasi et al., ICLR 2016): a recurrent network over learned item vectors.

A GRU reads the item vectors, and a linear layer maps its states to the width of the item vectors
(section 3.1 of the paper; the GRU has no biases and is wider than the item vectors, as in RecBole).

The papers train on sessions in parallel, with pairwise losses over the other items of the batch:
TOP1 and BPR (ICLR 2016), and TOP1-max and BPR-max with more negatives (Hidasi and Karatzoglou, CIKM
2018). mmrec trains on windows, by default with a softmax over the catalogue, which RecBole uses as
well.

Legend: B batch, L sequence length, N items, D width, H width of the GRU.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from features.errors import UserError
from trainer.config import LayerCount, PositiveInt, Probability
from trainer.data.batches import Sequences
from trainer.kernels.elementwise import dropout
from trainer.losses.base import ItemVectors
from trainer.models.base import Catalogue
from trainer.models.causal import CausalSettings
from trainer.models.item_ids import ItemIdRecommender
from trainer.models.sasrec import SASRec
from trainer.modules.sequence_encoders import SequenceEncoder
from trainer.modules.transformer import initialise

_ORIGINAL = {
    "dim": 100,
    "hidden": 100,
    "layers": 1,
    "projection": False,
    "gru_bias": True,
    "dropout": 0.0,
    "exclude": "window",
    "epochs": 10,
    "lr": 1e-3,
    "schedule": "constant",
    "weight_decay": 0.0,
    "clip": 0.0,
}
"""What both papers have: 100 units, whose states are the queries. The rates of the papers (0.01 and
0.2) are those of Adagrad."""


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
    state_dropout: Probability = 0.0
    """Dropout probability of the states of the GRU."""
    projection: bool = True
    """Map the states of the GRU to the width of the item vectors by a linear layer; false: the
    states are the queries, and ``hidden`` equals ``dim``."""
    gru_bias: bool = False
    """Use biases in the GRU."""
    tied: bool = True
    """Read the item vectors that are ranked; false: the GRU reads a second vector of each item."""

    def check(self) -> None:
        """Check that states without a projection have the width of item vectors."""
        super().check()
        if not self.projection and self.hidden != self.dim:
            raise UserError(
                f"hidden={self.hidden} must equal dim={self.dim} with projection=false;"
                " change one of them"
            )


class GRU4Rec(ItemIdRecommender):
    """A GRU over item ids."""

    settings_class = GRU4RecConfig
    settings: GRU4RecConfig
    item_tables: ClassVar = ("item_encoder.", "input_vectors.")
    unread = (
        "heads",
        "activation",
        "final_norm",
        "attention_bias",
        "norm_eps",
        "inner_dropout",
    )
    train_defaults: ClassVar = SASRec.train_defaults
    presets: ClassVar = {
        # ICLR 2016, TOP1 on RecSys Challenge 2015: one-hot inputs are a table of its own.
        "published": {
            **_ORIGINAL,
            "loss": "top1",
            "tied": False,
            "state_dropout": 0.5,
            "batch_size": 50,
        },
        # CIKM 2018, BPR-max with 2,048 more negatives and one table of item vectors.
        "published-2018": {
            **_ORIGINAL,
            "loss": "bpr-max",
            "negatives": 2048,
            "negatives_power": 0.0,
            "score_penalty": 0.5,
            "batch_size": 32,
        },
    }
    variants: ClassVar = {
        "TOP1 (2016)": "--set loss=top1",
        "BPR-max (2018)": "--set loss=bpr-max --set negatives=2048",
    }

    def __init__(self, settings: GRU4RecConfig, catalogue: Catalogue) -> None:
        super().__init__(settings, catalogue)
        self.sequence_encoder = _Encoder(settings)
        self.input_vectors: nn.Embedding | None = None
        if not settings.tied:
            self.input_vectors = nn.Embedding(catalogue.n_items, settings.dim)
        initialise(self)
        for name, parameter in self.sequence_encoder.gru.named_parameters():
            if name.startswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.xavier_uniform_(parameter)

    def row_tables(self) -> list[nn.Embedding]:
        """Return the table of input vectors as well, which no loss reads."""
        inputs = [] if self.input_vectors is None else [self.input_vectors]
        return super().row_tables() + inputs

    def states(self, items: ItemVectors, sequences: Sequences) -> Tensor:
        """Return the state after each item: (B, L, D). Input vectors are not normalised."""
        if self.input_vectors is None:
            return super().states(items, sequences)
        return self.encode_rows(self.input_vectors, sequences)


class _Encoder(SequenceEncoder):
    def __init__(self, settings: GRU4RecConfig) -> None:
        super().__init__(settings, attention_dropout=0.0)
        self.state_dropout = settings.state_dropout
        self.gru = nn.GRU(
            settings.dim,
            settings.hidden,
            settings.layers,
            bias=settings.gru_bias,
            batch_first=True,
        )
        self.out = (
            nn.Linear(settings.hidden, settings.dim) if settings.projection else nn.Identity()
        )

    def forward(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the state after each item: (B, L, D)."""
        hidden_BLH, _ = self.gru(dropout(x_BLD, self.settings.dropout, self.training))
        hidden_BLH = dropout(hidden_BLH, self.state_dropout, self.training)
        states_BLD: Tensor = self.out(hidden_BLH)
        return states_BLD
