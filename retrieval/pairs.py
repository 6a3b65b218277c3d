"""Pairs of a user and an item for one block of users: seen pairs and corrected pairs.

Shape suffixes: U users, B users of the block, F items per user, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from retrieval.seen_items import SeenItems
from retrieval.sparse_scores import SparseScores

if TYPE_CHECKING:
    import torch

Pairs: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"
"""(P,) rows in a block of users, and (P,) items."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorrectedPairs:
    """Pairs of a block of users that have a correction, in ascending order of the item."""

    row: torch.Tensor
    """(P,) row in the block, int64."""
    item: torch.Tensor
    """(P,) item, int64."""
    value: torch.Tensor
    """(P,) score that is added to the inner product, float64."""
    is_seen: torch.Tensor
    """(P,) bool, True if the user has seen the item."""

    def where(self, chosen: torch.Tensor | slice) -> CorrectedPairs:
        """Return the pairs that `chosen` selects: a (P,) bool mask or a slice."""
        return CorrectedPairs(
            row=self.row[chosen],
            item=self.item[chosen],
            value=self.value[chosen],
            is_seen=self.is_seen[chosen],
        )

    def between(self, items: slice) -> CorrectedPairs:
        """Return the pairs whose item is in a range of items."""
        import torch

        edges = self.item.new_tensor([items.start, items.stop])
        begin, end = torch.searchsorted(self.item, edges).tolist()
        return self.where(slice(begin, end))

    def with_seen(self, seen: Pairs, chosen: torch.Tensor | None = None) -> Pairs:
        """Return the seen pairs followed by the unseen corrected pairs, or the chosen ones of them.

        Args:
            seen: Distinct (row in the block, seen item).
            chosen: (P,) bool, the corrected pairs to add; None adds all.
        """
        import torch

        added = ~self.is_seen if chosen is None else chosen & ~self.is_seen
        return torch.cat([seen[0], self.row[added]]), torch.cat([seen[1], self.item[added]])


def seen_pairs(exclude: SeenItems | None, users: slice, items: int, device: torch.device) -> Pairs:
    """Return the distinct seen pairs of a block of users, without pairs if `exclude` is None.

    Args:
        exclude: Seen items of all users.
        users: Users of the block.
        items: Number of items.
        device: Device of the result.
    """
    import torch

    if exclude is None:
        empty = torch.zeros(0, dtype=torch.int64, device=device)
        return empty, empty
    row, item = exclude.pairs(users.start, users.stop, items)
    return torch.from_numpy(row).to(device), torch.from_numpy(item).to(device)


def corrected_pairs(
    correction: SparseScores | None,
    users: slice,
    seen: Pairs,
    items: int,
    target_U: torch.Tensor | None = None,
) -> CorrectedPairs | None:
    """Return the corrected pairs of a block of users, on the device of the seen pairs.

    Args:
        correction: Additive scores of all users; None returns None.
        users: Users of the block.
        seen: Distinct (row in the block, seen item).
        items: Number of items.
        target_U: (U,) target of each user. The pair of a user and its target is left out.
    """
    import torch

    if correction is None:
        return None
    row, item, value = correction.entries(users.start, users.stop)
    order = np.argsort(item, kind="stable")
    device = seen[0].device
    row_P, item_P, value_P = (
        torch.from_numpy(values[order]).to(device) for values in (row, item, value)
    )
    if target_U is not None:
        is_other_P = item_P != target_U[users][row_P]
        row_P, item_P, value_P = row_P[is_other_P], item_P[is_other_P], value_P[is_other_P]
    is_seen = torch.isin(row_P * items + item_P, seen[0] * items + seen[1])
    return CorrectedPairs(row=row_P, item=item_P, value=value_P, is_seen=is_seen)


def most_pairs(row_P: torch.Tensor) -> int:
    """Return the largest number of pairs that one row has."""
    return int(row_P.bincount().max()) if len(row_P) else 0


def contains(pairs: Pairs, item_BF: torch.Tensor, count: int) -> torch.Tensor:
    """Return (B, F) bool, True where (row, item) is one of the pairs.

    Args:
        pairs: Rows and items.
        item_BF: Items of each row.
        count: Number of items of the catalogue.
    """
    import torch

    row_B = torch.arange(len(item_BF), device=item_BF.device)
    return torch.isin(row_B[:, None] * count + item_BF, pairs[0] * count + pairs[1])
