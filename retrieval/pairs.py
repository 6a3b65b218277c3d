"""Pairs of a user and an item, for one block of users: the seen ones and the corrected ones.

Shape suffixes: U users, B users of the block, F items listed for each, P pairs.
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
    """Corrected pairs of a block of users, in ascending order of the item."""

    row: torch.Tensor
    """(P,) row in the block, int64."""
    item: torch.Tensor
    """(P,) item, int64."""
    value: torch.Tensor
    """(P,) score that is added to the inner product, float64."""
    is_seen: torch.Tensor
    """(P,) whether the user has seen the item, bool."""

    def where(self, chosen: torch.Tensor | slice) -> CorrectedPairs:
        """Return the chosen pairs; `chosen` is a (P,) mask or a slice."""
        return CorrectedPairs(
            row=self.row[chosen],
            item=self.item[chosen],
            value=self.value[chosen],
            is_seen=self.is_seen[chosen],
        )

    def between(self, items: slice) -> CorrectedPairs:
        """Return the pairs of a range of items."""
        import torch

        edges = self.item.new_tensor([items.start, items.stop])
        begin, end = torch.searchsorted(self.item, edges).tolist()
        return self.where(slice(begin, end))

    def with_seen(self, seen: Pairs, chosen: torch.Tensor | None = None) -> Pairs:
        """Return the seen pairs and the (chosen) corrected pairs that are not seen."""
        import torch

        new = ~self.is_seen if chosen is None else chosen & ~self.is_seen
        return torch.cat([seen[0], self.row[new]]), torch.cat([seen[1], self.item[new]])


def seen_pairs(
    exclude: SeenItems | None, users: slice, items: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the distinct (row in the block of users, item) to leave out, on the device."""
    import torch

    if exclude is None:
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        return nothing, nothing
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
        correction: Scores of all users; the result is None if it is None.
        users: Users of the block.
        seen: Distinct (row in the block, seen item).
        items: Number of items.
        target_U: (U,) target of each user; pairs of a user and the target are left out.
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
        rival_P = item_P != target_U[users][row_P]
        row_P, item_P, value_P = row_P[rival_P], item_P[rival_P], value_P[rival_P]
    is_seen = torch.isin(row_P * items + item_P, seen[0] * items + seen[1])
    return CorrectedPairs(row=row_P, item=item_P, value=value_P, is_seen=is_seen)


def most_pairs(row_P: torch.Tensor) -> int:
    """Return the largest number of pairs that one row has."""
    return int(row_P.bincount().max()) if len(row_P) else 0


def contains(pairs: Pairs, item_BF: torch.Tensor, count: int) -> torch.Tensor:
    """Return whether the pairs hold (row, item) for each item of a (B, F) table."""
    import torch

    row_B = torch.arange(len(item_BF), device=item_BF.device)
    return torch.isin(row_B[:, None] * count + item_BF, pairs[0] * count + pairs[1])
