"""SASRec (Kang and McAuley, ICDM 2018): self-attention over learned item vectors.

The model differs from the paper where later work found the paper's choice to be weaker: a softmax
over the catalogue instead of one sampled negative (Klenitskiy and Vasilev, RecSys 2023), windows
over the whole history, and BERT's order of layers (a LayerNorm on the embedded items, post-LN
blocks, GELU). ``score=cosine`` trains on cosines, as MMSRec does. Attention weights have no
dropout: on ml-100k it did not improve validation, and without it attention needs no L x L matrix.

Legend: B batch, L sequence length, N items, K items to encode, D width.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from trainer.config import LayerCount, PositiveInt, Probability
from trainer.data.batches import Batch, ItemFeatures, Sequences
from trainer.losses.base import DrawnItems, ItemVectors
from trainer.models.base import Catalogue
from trainer.models.causal import CausalRecommender, CausalSettings
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


class SASRec(CausalRecommender):
    """Self-attentive sequential recommendation over item ids."""

    settings_class = SASRecConfig
    settings: SASRecConfig
    # Chosen on the validation split of ml-100k.
    train_defaults: ClassVar = {
        "lr": 2e-3, "epochs": 40, "schedule": "cosine", "monitor": "NDCG@10",
    }  # fmt: skip
    variants: ClassVar = {"on cosines, as mmsrec": "--set score=cosine --set temperature=0.07"}
    item_tables = ("item_encoder.",)
    item_encoder: nn.Embedding

    def __init__(self, settings: SASRecConfig, catalogue: Catalogue) -> None:
        super().__init__(settings, catalogue)
        self.item_encoder = nn.Embedding(catalogue.n_items, settings.dim)
        self.sequence_encoder = SASRecEncoder(settings, attention_dropout=0.0)
        initialise(self)

    def encode_some(self, items_K: Tensor, features: ItemFeatures) -> Tensor:
        """Return the learned vectors of the given items: (K, D)."""
        vectors_KD: Tensor = self.item_encoder(items_K)
        return vectors_KD

    def encode_items(self, features: ItemFeatures) -> Tensor:
        """Return the learned item vectors: (N, D); with ``score=cosine`` they have length 1."""
        return self.settings.normalise(self.item_encoder.weight)

    def batch_items(self, batch: Batch, drawn: DrawnItems | None) -> ItemVectors:
        """Return the whole table of learned vectors, which needs no encoding."""
        return ItemVectors(vectors_KD=self.encode_items(batch.features))

    def states(self, items: ItemVectors, sequences: Sequences) -> Tensor:
        """Return the state after each item: (B, L, D). Input vectors are not normalised."""
        x_BLD = self.item_encoder(sequences.items_BL)
        states_BLD: Tensor = self.sequence_encoder(x_BLD, sequences.lengths_B)
        return states_BLD
