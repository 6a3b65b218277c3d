"""Additive scores of a few items per user: the sparse correction of an inner product.

A model's score is an inner product plus, if the model defines one, a sparse correction, for example
a bias on items of the history or the log of transition counts. The correction is in units of the
inner product. It is a (users, items) matrix in compressed sparse rows; a missing entry is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retrieval.compressed_rows import Ints, check_rows, check_shape, take_rows
from retrieval.seen_items import SeenItems

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SparseScores:
    """Additive scores per user and item, as compressed sparse rows.

    Raises:
        ValueError: The arrays are not well-formed compressed rows, an item occurs twice in a row,
            the items of a row do not ascend, or a value is not a finite float64.

    Examples:
        User 0 has -7.4 for item 1 and 0.5 for item 4; user 1 has no entry:

        >>> scores = SparseScores(
        ...     items=np.array([1, 4]), offsets=np.array([0, 2, 2]), values=np.array([-7.4, 0.5])
        ... )
        >>> len(scores), len(scores.rows(1, 2).items)
        (2, 0)
    """

    items: Ints
    """(nnz,) item of each entry; ascending in each row, each item at most once."""
    offsets: Ints
    """(U + 1,) the entries of user u are those from offsets[u] to offsets[u + 1]."""
    values: Values
    """(nnz,) score that is added to the inner product."""

    def __post_init__(self) -> None:
        """Check the arrays."""
        check_rows("correction", self.items, self.offsets)
        if not isinstance(self.values, np.ndarray) or self.values.dtype != np.float64:
            raise ValueError("correction values must be a float64 numpy array")
        if self.values.shape != self.items.shape:
            raise ValueError(
                f"correction has {len(self.items)} items but values of shape {self.values.shape}"
            )
        ascends = self.items[1:] > self.items[:-1]
        starts = self.offsets[1:-1]
        ascends[starts[(starts > 0) & (starts < len(self.items))] - 1] = True
        if not ascends.all():
            entry = int(np.argmin(ascends)) + 1
            row = int(np.searchsorted(self.offsets, entry, side="right")) - 1
            raise ValueError(
                f"correction row {row}: item {self.items[entry]} follows {self.items[entry - 1]}; "
                "items must ascend and occur once"
            )
        if not np.isfinite(self.values).all():
            raise ValueError("correction values hold NaN or infinity")

    @classmethod
    def empty(cls, users: int) -> SparseScores:
        """Return a correction without entries for this number of users."""
        return cls(
            items=np.zeros(0, np.int64),
            offsets=np.zeros(users + 1, np.int64),
            values=np.zeros(0),
        )

    @classmethod
    def from_dense(cls, values_UN: npt.NDArray[np.floating]) -> SparseScores:
        """Return the nonzero values of a (users, items) matrix."""
        row, item = values_UN.nonzero()
        counts = np.bincount(row, minlength=len(values_UN))
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        return cls(items=item, offsets=offsets, values=values_UN[row, item].astype(np.float64))

    @classmethod
    def of_seen(cls, seen: SeenItems, value: float) -> SparseScores:
        """Return one value for each item that a user has seen.

        Examples:
            >>> seen = SeenItems(items=np.array([4, 1, 4]), offsets=np.array([0, 3]))
            >>> SparseScores.of_seen(seen, -7.0).items
            array([1, 4])
        """
        row, item = seen.pairs(0, len(seen), int(seen.items.max(initial=0)) + 1)
        offsets = np.searchsorted(row, np.arange(len(seen) + 1))
        return cls(items=item, offsets=offsets, values=np.full(len(item), value))

    @classmethod
    def of_keys(cls, key_P: Ints, value_P: Values, users: int, items: int) -> SparseScores:
        """Return the scores of the entries with the keys user * items + item, ascending."""
        offsets = np.searchsorted(key_P, np.arange(users + 1) * items)
        return cls(items=key_P % items, offsets=offsets, values=value_P)

    def __add__(self, other: SparseScores) -> SparseScores:
        """Return the sums of the scores of equally many users.

        Examples:
            >>> one = SparseScores.from_dense(np.array([[0.5, 0.0]]))
            >>> two = SparseScores.from_dense(np.array([[1.0, -1.0]]))
            >>> (one + two).values
            array([ 1.5, -1. ])
        """
        if len(self) != len(other):
            raise ValueError(f"scores of {len(self)} users and of {len(other)} cannot be added")
        items = 1 + max(int(self.items.max(initial=0)), int(other.items.max(initial=0)))
        keys, values = [], []
        for scores in (self, other):
            row, item, value = scores.entries(0, len(scores))
            keys.append(row * items + item)
            values.append(value)
        key_P, place = np.unique(np.concatenate(keys), return_inverse=True)
        sums = np.bincount(place, np.concatenate(values), len(key_P)).astype(np.float64)
        return SparseScores.of_keys(key_P, sums, len(self), items)

    def __len__(self) -> int:
        """Return the number of users."""
        return len(self.offsets) - 1

    def check(self, users: int, items: int) -> None:
        """Raise ValueError unless the rows fit a matrix of users x items."""
        check_shape("correction", len(self), self.items, users, items)

    def rows(self, begin: int, end: int) -> SparseScores:
        """Return the rows of users begin..end-1, without a copy of the entries."""
        entries = slice(self.offsets[begin], self.offsets[end])
        return SparseScores(
            items=self.items[entries],
            offsets=self.offsets[begin : end + 1] - self.offsets[begin],
            values=self.values[entries],
        )

    def take(self, users: Ints) -> SparseScores:
        """Return the rows of these users, in this order."""
        index, offsets = take_rows(self.offsets, users)
        return SparseScores(items=self.items[index], offsets=offsets, values=self.values[index])

    def entries(self, begin: int, end: int) -> tuple[Ints, Ints, Values]:
        """Return (row, item, value) of users begin..end-1, sorted; row 0 is user `begin`."""
        entries = slice(self.offsets[begin], self.offsets[end])
        lengths = np.diff(self.offsets[begin : end + 1])
        row = np.repeat(np.arange(len(lengths)), lengths)
        return row, self.items[entries], self.values[entries]

    def values_at(self, begin: int, items: Ints) -> Values:
        """Return the value of one item for each of the users begin..begin+len(items)-1.

        Args:
            begin: First user.
            items: (B,) one item for each user.

        Returns:
            (B,) value, 0 where there is no entry.
        """
        row, item, value = self.entries(begin, begin + len(items))
        match = item == items[row]
        values = np.zeros(len(items))
        values[row[match]] = value[match]
        return values
