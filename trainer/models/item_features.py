"""The base class of models that encode items from pooled features and read histories causally.

Legend: B batch, L sequence length, N items, K items to encode, D width.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from features.errors import UserError
from trainer.data.batches import Batch, ItemFeatures, Sequences
from trainer.data.device_copy import to_device
from trainer.losses.base import DrawnItems, ItemVectors
from trainer.models.base import Catalogue
from trainer.models.causal import CausalRecommender
from trainer.modules.chunked_encoding import encode_blocks
from trainer.modules.sequence_encoders import last_state, take_slots

_ITEMS_PER_CHUNK = 2**15  # of the catalogue; bounds the activations without gradients


class FeatureRecommender(CausalRecommender):
    """A causal sequence encoder over item vectors that are encoded from features.

    The sequence encoder reads the item vectors before normalisation, also with ``score=cosine``. A
    subclass creates ``item_encoder`` and ``sequence_encoder`` and implements ``encode_some``.

    Raises:
        UserError: There are no features.
    """

    needs_features: ClassVar[bool] = True

    def __init__(self, settings: Any, catalogue: Catalogue) -> None:
        super().__init__(settings, catalogue)
        check_features(type(self).__name__.lower(), catalogue)

    def encode_items(self, features: ItemFeatures) -> Tensor:
        """Encode the whole catalogue: (N, D); with ``score=cosine`` the vectors have length 1."""
        return self.settings.normalise(self._encode_catalogue(features))

    def encode_sequences(
        self, item_vectors_ND: Tensor, sequences: Sequences, features: ItemFeatures
    ) -> Tensor:
        """Return the state at each history's last item: (B, D).

        The items of the histories are encoded again, because ``item_vectors_ND`` is normalised.
        """
        sequences = without_padding(sequences)
        ids_K = to_device(sequences.on_host.items_BL.unique(), sequences.items_BL.device)
        items = ItemVectors(vectors_KD=self.encode_some(ids_K, features), ids_K=ids_K)
        return self.settings.normalise(last_state(self.states(items, sequences), sequences))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the next-item loss over the predicted positions."""
        inputs, targets, slot_M = self.targets(batch)
        drawn = self.next_item_loss.draw(targets, batch)
        items = self.batch_items(batch, drawn)
        query_MD = self.settings.normalise(take_slots(self.states(items, inputs), slot_M))
        scored = self.normalised(items)
        return {"loss": self.next_item_loss(query_MD, scored, targets, batch, drawn)}

    def batch_items(self, batch: Batch, drawn: DrawnItems | None) -> ItemVectors:
        """Encode the items that a batch needs, see the base class; they are not normalised."""
        if self.next_item_loss.needs_catalogue:
            return ItemVectors(vectors_KD=self._encode_catalogue(batch.features))
        return self.distinct_items(batch, drawn)

    def distinct_items(self, batch: Batch, drawn: DrawnItems | None = None) -> ItemVectors:
        """Encode each distinct item of a batch and of the drawn items, without normalisation."""
        ids_K = batch.distinct_items(None if drawn is None else drawn.on_host.items_X)
        return ItemVectors(vectors_KD=self.encode_distinct(ids_K, batch.features), ids_K=ids_K)

    def normalised(self, items: ItemVectors) -> ItemVectors:
        """Return item vectors as the loss takes them: of length 1 with ``score=cosine``."""
        vectors_KD = self.settings.normalise(items.vectors_KD)
        return ItemVectors(vectors_KD=vectors_KD, ids_K=items.ids_K)

    def _encode_catalogue(self, features: ItemFeatures) -> Tensor:
        device = next(self.parameters()).device
        items_N = torch.arange(features.n_items, device=device)
        return encode_blocks(
            lambda items_K: self.encode_some(items_K, features),
            items_N,
            _ITEMS_PER_CHUNK,
            chunks=self.chunks,
        )


def check_features(name: str, catalogue: Catalogue) -> None:
    """Raise a UserError that names the model if the catalogue has no features."""
    if not catalogue.widths:
        raise UserError(
            f"{name} needs features; run mmrec extract for this dataset, or train sasrec"
        )


def without_padding(sequences: Sequences) -> Sequences:
    """Return sequences whose padding repeats the first item of its row."""
    rows = sequences.on_host
    items_BL = torch.where(rows.mask_BL, rows.items_BL, rows.items_BL[:, :1])
    inside = Sequences(items_BL=items_BL, lengths_B=rows.lengths_B, users_B=rows.users_B)
    return inside.to(sequences.items_BL.device)
