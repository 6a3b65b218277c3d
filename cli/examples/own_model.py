"""A model of one's own: the next item resembles the mean of the last ones, by text and image.

A package offers the model to mmrec by an entry point in its pyproject.toml:

    [project.entry-points."mmrec.models"]
    recent = "own_model:Recent"

After ``pip install`` of that package, every command knows it: mmrec train --model recent

Legend: B batch, L sequence length, K items to encode, D width.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from trainer.config import PositiveInt
from trainer.data.batches import ItemFeatures
from trainer.models.base import Catalogue
from trainer.models.causal import CausalSettings
from trainer.models.item_features import FeatureRecommender
from trainer.modules.sequence_encoders import SequenceEncoder
from trainer.modules.transformer import initialise


@dataclass(frozen=True, kw_only=True)
class RecentConfig(CausalSettings):
    """Settings of the model; width, length, loss, score and temperature are inherited."""

    last: PositiveInt = 5
    """Number of items of a history that count."""


class MeanOfLast(SequenceEncoder):
    """The mean of the last items up to each position."""

    def __init__(self, settings: RecentConfig) -> None:
        super().__init__(settings, attention_dropout=0.0)
        self.last = settings.last

    def forward(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the state after each item: (B, L, D); it depends on no later item."""
        sums_BLD = x_BLD.cumsum(1)
        before_BLD = torch.zeros_like(sums_BLD)
        before_BLD[:, self.last :] = sums_BLD[:, : -self.last]
        counts_L = torch.arange(1, x_BLD.shape[1] + 1, device=x_BLD.device).clamp(max=self.last)
        return (sums_BLD - before_BLD) / counts_L[:, None]


class Recent(FeatureRecommender):
    """A linear map of each modality; a modality that an item lacks adds nothing."""

    settings_class = RecentConfig
    settings: RecentConfig
    item_encoder: nn.ModuleDict
    train_defaults: ClassVar = {"lr": 1e-3, "epochs": 30}

    def __init__(self, settings: RecentConfig, catalogue: Catalogue) -> None:
        super().__init__(settings, catalogue)
        maps = {name: nn.Linear(width, settings.dim) for name, width in catalogue.widths.items()}
        self.item_encoder = nn.ModuleDict(maps)
        self.sequence_encoder = MeanOfLast(settings)
        initialise(self)

    def encode_some(self, ids_K: Tensor, features: ItemFeatures) -> Tensor:
        """Return the vectors of some items: (K, D), before normalisation."""
        terms: list[Tensor] = [
            encoder(features.vectors[name][ids_K]) * features.present[name][ids_K, None]
            for name, encoder in self.item_encoder.items()
        ]
        return torch.stack(terms).sum(0)
