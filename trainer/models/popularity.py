"""Popularity: rank items by their number of training interactions, equally for every user.

Legend: B batch, N items.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config import Settings
from trainer.data.batches import Batch, ItemFeatures, Sequences, TrainSet
from trainer.data.windows import WindowSampling
from trainer.models.base import Catalogue, Recommender


@dataclass(frozen=True, kw_only=True)
class PopularityConfig(Settings):
    """Popularity has no settings."""


class Popularity(Recommender):
    """Score an item by its number of training interactions.

    The vector of an item is that number, and every query is 1. No parameter is trained.
    """

    settings_class = PopularityConfig
    settings: PopularityConfig
    item_tables = ("counts_N1",)
    fitted_buffers = ("counts_N1",)
    counts_N1: Tensor

    def __init__(self, settings: PopularityConfig, catalogue: Catalogue) -> None:
        super().__init__(settings, catalogue)
        self.register_buffer("counts_N1", torch.zeros(catalogue.n_items, 1))

    def fit_buffers(self, features: ItemFeatures, train: TrainSet) -> None:
        """Count the training interactions of each item."""
        self.counts_N1.copy_(train.counts_N[:, None])

    @property
    def window_sampling(self) -> WindowSampling:
        """The shortest windows, which are not used."""
        return WindowSampling(length=2, stride=1, every_target=True)

    @property
    def history(self) -> int:
        """One item; the scores do not depend on histories."""
        return 1

    def encode_items(self, features: ItemFeatures) -> Tensor:
        """Return the number of training interactions of each item: (N, 1)."""
        return self.counts_N1

    def encode_sequences(
        self, item_vectors_ND: Tensor, sequences: Sequences, features: ItemFeatures
    ) -> Tensor:
        """Return ones: (B, 1)."""
        return item_vectors_ND.new_ones(len(sequences.lengths_B), 1)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return 0, because no parameter is trained."""
        return {"loss": self.counts_N1.new_zeros(())}
