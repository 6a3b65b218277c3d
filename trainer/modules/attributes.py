"""Attributes of items, such as categories: their settings, and a vector for each column.

Legend: K items, P attributes of an item, A attributes of the catalogue, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.config import PositiveInt, Settings
from trainer.data.batches import ItemFeatures
from trainer.data.multi_dataset import AttributeColumns


@dataclass(frozen=True, kw_only=True)
class AttributeSettings(Settings):
    """Settings of a model that reads attributes of items."""

    attributes: str = ""
    """Columns of the items that are attributes, separated by commas, such as
    ``categories,brand``."""
    attribute_least: PositiveInt = 1
    """Attributes of fewer items are left out."""

    @property
    def attribute_columns(self) -> AttributeColumns:
        """The columns, for :func:`trainer.data.multi_dataset.load_data`."""
        names = tuple(name.strip() for name in self.attributes.split(",") if name.strip())
        return AttributeColumns(columns=names, least=self.attribute_least)


def attribute_means(
    table: nn.Embedding, column: str, items_K: Tensor, features: ItemFeatures
) -> tuple[Tensor, Tensor]:
    """Return the mean vector of each item's attributes in a column.

    Args:
        table: A vector for each attribute, (A, D).
        column: Column of the items.
        items_K: (K,) int64.
        features: Features of the whole catalogue.

    Returns:
        (K, D), zero for items without attributes, and (K,) bool, true for items with attributes.
    """
    ids_KP = features.attributes[column][items_K]
    exists_KP = ids_KP >= 0
    vectors_KPD = functional.embedding(ids_KP.clamp_min(0), table.weight)
    total_KD = vectors_KPD.masked_fill(~exists_KP[..., None], 0).sum(1)
    counts_K = exists_KP.sum(1)
    return total_KD / counts_K.clamp_min(1)[:, None], counts_K > 0


def multi_hot(items_K: Tensor, features: ItemFeatures, n_attributes: int) -> Tensor:
    """Return (K, A) float, 1 where an item has an attribute of any column."""
    hot_KA = torch.zeros(len(items_K), n_attributes + 1, device=items_K.device)
    for table_NP in features.attributes.values():
        ids_KP = table_NP[items_K]
        hot_KA.scatter_(1, torch.where(ids_KP < 0, n_attributes, ids_KP), 1.0)
    return hot_KA[:, :-1]
