"""A part of the catalogue: the items that a search may list, and their numbers.

Legend: N items of the catalogue, S listed items, U users.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from retrieval.compressed_rows import Ints
from retrieval.seen_items import SeenItems

if TYPE_CHECKING:
    from retrieval.sparse_scores import SparseScores


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedItems:
    """The listed items, numbered from 0 in the order of the catalogue.

    Examples:
        Item 1 of three items is not listed:

        >>> listed = ListedItems.of(np.array([True, False, True]))
        >>> listed.numbers(np.array([2, 1])).tolist()
        [1, -1]
        >>> listed.restored(np.array([[1, 0, -1]])).tolist()
        [[2, 0, -1]]
    """

    rows_S: Ints
    """(S,) the number of each listed item in the catalogue, ascending."""
    number_N: Ints
    """(N,) the number of each item among the listed ones, -1 for the others."""

    @classmethod
    def of(cls, is_listed_N: npt.NDArray[np.bool_]) -> ListedItems:
        """Return the items where (N,) ``is_listed_N`` is true."""
        rows_S = np.flatnonzero(is_listed_N)
        number_N = np.full(len(is_listed_N), -1, np.int64)
        number_N[rows_S] = np.arange(len(rows_S))
        return cls(rows_S=rows_S, number_N=number_N)

    def __len__(self) -> int:
        """Return the number of listed items."""
        return len(self.rows_S)

    def numbers(self, items: Ints) -> Ints:
        """Return the numbers of items among the listed ones, -1 for the others."""
        return self.number_N[items]

    def seen(self, seen: SeenItems) -> SeenItems:
        """Return the listed items of each user."""
        items, offsets, _ = self._entries(seen.items, seen.offsets)
        return SeenItems(items=items, offsets=offsets)

    def scores(self, scores: SparseScores) -> SparseScores:
        """Return the scores of the listed items of each user."""
        items, offsets, is_listed = self._entries(scores.items, scores.offsets)
        return replace(scores, items=items, offsets=offsets, values=scores.values[is_listed])

    def restored(self, items: Ints) -> Ints:
        """Return the numbers in the catalogue of listed items; -1 stays -1."""
        return np.append(self.rows_S, -1)[items]

    def _entries(self, items: Ints, offsets: Ints) -> tuple[Ints, Ints, npt.NDArray[np.bool_]]:
        """Return the entries of listed items, their offsets, and (nnz,) whether each stays."""
        numbers = self.number_N[items]
        is_listed = numbers >= 0
        return numbers[is_listed], np.append(0, is_listed.cumsum())[offsets], is_listed
