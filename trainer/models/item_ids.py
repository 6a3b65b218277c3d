"""The base class of models that learn a vector for each item and read histories causally.

Legend: B batch, L sequence length, N items, K items to encode, D width.
"""

from typing import ClassVar

from torch import Tensor, nn

from trainer.data.batches import ItemFeatures, Sequences
from trainer.losses.base import ItemVectors
from trainer.models.base import Catalogue
from trainer.models.causal import CausalRecommender, CausalSettings


class ItemIdRecommender(CausalRecommender):
    """A causal sequence encoder over a learned vector for each item.

    A subclass creates ``sequence_encoder`` and initialises the parameters in its constructor.
    """

    item_tables: ClassVar[tuple[str, ...]] = ("item_encoder.",)
    item_encoder: nn.Embedding

    def __init__(self, settings: CausalSettings, catalogue: Catalogue) -> None:
        super().__init__(settings, catalogue)
        self.item_encoder = nn.Embedding(catalogue.n_items, settings.dim)

    def encode_some(self, items_K: Tensor, features: ItemFeatures) -> Tensor:
        """Return the learned vectors of the given items: (K, D)."""
        vectors_KD: Tensor = self.item_encoder(items_K)
        return vectors_KD

    def encode_items(self, features: ItemFeatures) -> Tensor:
        """Return the learned item vectors: (N, D); with ``score=cosine`` they have length 1."""
        return self.settings.normalise(self.item_encoder.weight)

    def row_tables(self) -> list[nn.Embedding]:
        """Return the table of item vectors if the loss reads a part of it."""
        return [] if self.next_item_loss.needs_catalogue else [self.item_encoder]

    def states(self, items: ItemVectors, sequences: Sequences) -> Tensor:
        """Return the state after each item: (B, L, D). Input vectors are not normalised."""
        return self.encode_rows(self.item_encoder, sequences)
