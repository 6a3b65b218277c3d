"""The base class of reference models whose scores are sparse, and which learn nothing by gradients.

Legend: B batch, N items.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from retrieval.seen_items import SeenItems
from retrieval.sparse_scores import SparseScores
from trainer.data.batches import Batch, ItemFeatures, Sequences
from trainer.data.windows import WindowSampling
from trainer.models.base import Catalogue, Recommender


class SparseRecommender(Recommender):
    """Score few items for each history. All vectors are zero: the scores are the correction.

    A subclass counts in ``fit_buffers`` and scores in :meth:`correction`. What it counts is counted
    again when a run is opened.
    """

    is_sparse = True
    zero_N1: Tensor

    def __init__(self, settings: Any, catalogue: Catalogue) -> None:
        super().__init__(settings, catalogue)
        self.register_buffer("zero_N1", torch.zeros(catalogue.n_items, 1), persistent=False)

    @property
    def window_sampling(self) -> WindowSampling:
        """The shortest windows, which are not used."""
        return WindowSampling(length=2, stride=1, every_target=True)

    @property
    def history(self) -> int:
        """One item: the correction reads whole histories, and the sequence encoder none of them."""
        return 1

    def encode_items(self, features: ItemFeatures) -> Tensor:
        """Return zeros: (N, 1)."""
        return self.zero_N1

    def encode_sequences(
        self, item_vectors_ND: Tensor, sequences: Sequences, features: ItemFeatures
    ) -> Tensor:
        """Return zeros: (B, 1)."""
        return item_vectors_ND.new_zeros(len(sequences.lengths_B), 1)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return a loss of 0: there is nothing to learn."""
        return {"loss": self.zero_N1.new_zeros(())}

    @abstractmethod
    def correction(self, histories: SeenItems) -> SparseScores:
        """Return the scores of E histories."""
