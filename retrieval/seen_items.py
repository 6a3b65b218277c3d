"""The items that each user has interacted with. A filtered ranking leaves them out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retrieval.compressed_rows import check_rows, check_shape, take_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class SeenItems:
    """The seen items of each user, as compressed sparse rows.

    Raises:
        ValueError: The arrays are not well-formed compressed rows.

    Examples:
        User 0 has seen the items 4 and 1, user 1 none:

        >>> seen = SeenItems(items=np.array([4, 1]), offsets=np.array([0, 2, 2]))
        >>> len(seen)
        2
    """

    items: npt.NDArray[np.int64]
    """(nnz,) item of each entry; the entries of a user may repeat and be in any order."""
    offsets: npt.NDArray[np.int64]
    """(U + 1,) the items of user u are items[offsets[u]:offsets[u + 1]]."""

    def __post_init__(self) -> None:
        """Check the arrays."""
        check_rows("seen", self.items, self.offsets)

    @classmethod
    def empty(cls) -> SeenItems:
        """Return the seen items of no user."""
        return cls(items=np.zeros(0, np.int64), offsets=np.zeros(1, np.int64))

    def __len__(self) -> int:
        """Return the number of users."""
        return len(self.offsets) - 1

    def check(self, users: int, items: int) -> None:
        """Raise ValueError unless the rows fit a matrix of users x items."""
        check_shape("exclude", len(self), self.items, users, items)

    def take(self, users: npt.NDArray[np.int64]) -> SeenItems:
        """Return the rows of these users, in this order."""
        index, offsets = take_rows(self.offsets, users)
        return SeenItems(items=self.items[index], offsets=offsets)

    def contain(self, items: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return whether each user has seen an item.

        Args:
            items: (U,) one item for each user.

        Examples:
            >>> seen = SeenItems(items=np.array([4, 1]), offsets=np.array([0, 2, 2]))
            >>> seen.contain(np.array([1, 1]))
            array([ True, False])
        """
        lengths = np.diff(self.offsets)
        row = np.repeat(np.arange(len(lengths)), lengths)
        return np.bincount(row[self.items == items[row]], minlength=len(lengths)) > 0

    def pairs(
        self, start: int, stop: int, items: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the distinct (row, item) of users start..stop-1, sorted; row 0 is user `start`."""
        lengths = np.diff(self.offsets[start : stop + 1])
        rows = np.repeat(np.arange(len(lengths)), lengths)
        keys = np.unique(rows * items + self.items[self.offsets[start] : self.offsets[stop]])
        return keys // items, keys % items
