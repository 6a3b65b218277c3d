"""Transitions: counts of item to later item in the training histories.

A reference without gradients: on Amazon Beauty it is above several published networks. The count of
a pair of items d positions apart (d <= ``window``) grows by 1/d. A row is divided by the sum of the
row + ``smoothing``. A user's score of an item is the sum over the last ``length`` items of the
history of the item's entry in their rows, the newest row with weight 1, the one before it 1/2, and
so on. The own transitions of a training user are among the counts; those of the held-out items are
not.

Legend: N items, E users, I interactions, X entries of the counts, Q items of histories that scores
read, P entries of the scores.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrieval.seen_items import SeenItems
from retrieval.sparse_scores import SparseScores
from trainer.config import NonNegativeFloat, PositiveInt, Settings
from trainer.data.batches import ItemFeatures, TrainSet
from trainer.data.windows import WindowSampling
from trainer.models.base import Catalogue
from trainer.models.sparse import SparseRecommender

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_SPREAD = 4  # dense keys: at most this many possible keys for each key
_POSITIONS_AT_ONCE = 2**20  # positions of earlier items whose pairs are counted together


@dataclass(frozen=True, kw_only=True)
class TransitionsConfig(Settings):
    """Settings of the transition counts."""

    window: PositiveInt = 10
    """Largest distance of two items of a history that are counted."""
    length: PositiveInt = 10
    """Largest number of items of a history that are read."""
    smoothing: NonNegativeFloat = 3.0
    """Added to the sum of a row before the row is divided by it."""


class Transitions(SparseRecommender):
    """Score items by how often they followed the items of a history."""

    settings_class = TransitionsConfig
    settings: TransitionsConfig

    def __init__(self, settings: TransitionsConfig, catalogue: Catalogue) -> None:
        super().__init__(settings, catalogue)
        self._counts = CountedTransitions.of(SeenItems.empty(), catalogue.n_items, settings)

    def fit_buffers(self, features: ItemFeatures, train: TrainSet) -> None:
        """Count the transitions of the training histories."""
        self._counts = CountedTransitions.of(train.histories, len(self.zero_N1), self.settings)

    @property
    def window_sampling(self) -> WindowSampling:
        """Windows of a history and its next item, which are not used."""
        length = self.settings.length
        return WindowSampling(length=length + 1, stride=length, every_target=True)

    @property
    def history(self) -> int:
        """Largest number of items of a history that are read."""
        return self.settings.length

    def correction(self, histories: SeenItems) -> SparseScores:
        """Return the scores of the items that followed one of the last items of each history."""
        counts, n_items = self._counts, self._counts.n_items
        key_Q, weight_Q = counts.newest(histories)
        factor_Q = weight_Q * counts.shares(counts.totals_N[key_Q % n_items])
        key_P, value_P = sum_by_key(*counts.expand(key_Q, factor_Q))
        return SparseScores.of_keys(key_P, value_P, len(histories), n_items)


@dataclass(frozen=True, slots=True)
class CountRows:
    """A sparse matrix (N x N) as compressed rows."""

    items: npt.NDArray[np.integer[Any]]
    offsets: Ints
    values: Floats

    def take(self, rows: Ints) -> "CountRows":
        """Return some rows, one after the other."""
        lengths = np.diff(self.offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        index = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return CountRows(self.items[index], offsets, self.values[index])


@dataclass(frozen=True, kw_only=True, slots=True)
class CountedTransitions:
    """The transitions of the training histories."""

    rows: CountRows
    """(N x N) sums of 1 / distance: row of the earlier item, column of the later item."""
    totals_N: Floats
    """(N,) sum of each row."""
    settings: TransitionsConfig

    @classmethod
    def of(
        cls, histories: SeenItems, n_items: int, settings: TransitionsConfig
    ) -> "CountedTransitions":
        """Count the transitions of histories, oldest item first."""
        user_I = np.repeat(np.arange(len(histories)), np.diff(histories.offsets))
        nobody_I = np.zeros(len(user_I), np.int64)
        order_I = np.argsort(histories.items, kind="stable")
        ends_N = np.cumsum(np.bincount(histories.items, minlength=n_items))
        parts = [(np.zeros(0, np.int32), np.zeros(0))]
        lengths_N, totals_N = np.zeros(n_items, np.int64), np.zeros(n_items)
        start = 0
        for end in _block_ends(ends_N, _POSITIONS_AT_ONCE):
            key_X, value_X = _sum_pairs(
                histories.items, user_I, nobody_I, order_I[start:end], n_items, settings.window
            )
            row_X = key_X // n_items
            lengths_N += np.bincount(row_X, minlength=n_items)
            totals_N += np.bincount(row_X, value_X, n_items)
            parts.append(((key_X % n_items).astype(np.int32), value_X))
            start = end
        rows = CountRows(
            items=np.concatenate([items for items, _ in parts]),
            offsets=np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int64),
            values=np.concatenate([values for _, values in parts]),
        )
        return cls(rows=rows, totals_N=totals_N, settings=settings)

    @property
    def n_items(self) -> int:
        """Number of items N."""
        return len(self.totals_N)

    def newest(self, histories: SeenItems) -> tuple[Ints, Floats]:
        """Return the items that the scores of E histories read, and their weights.

        Returns:
            (Q,) keys row of the history * N + item, ascending, and (Q,) the sums of 1 / (age + 1).
        """
        ends, lengths = histories.offsets[1:], np.diff(histories.offsets)
        keys, weights = [np.zeros(0, np.int64)], [np.zeros(0)]
        for age in range(self.settings.length):
            users = np.flatnonzero(lengths > age)
            keys.append(users * self.n_items + histories.items[ends[users] - 1 - age])
            weights.append(np.full(len(users), 1 / (age + 1)))
        return sum_by_key(np.concatenate(keys), np.concatenate(weights))

    def expand(self, key_Q: Ints, factor_Q: Floats) -> tuple[Ints, Floats]:
        """Return the rows of the items of ``newest``, times a factor.

        Returns:
            (P,) keys row of the history * N + later item, and (P,) products; a key can repeat.
        """
        rows = self.rows.take(key_Q % self.n_items)
        lengths_Q = np.diff(rows.offsets)
        keys = np.repeat(key_Q // self.n_items, lengths_Q) * self.n_items + rows.items
        return keys, np.repeat(factor_Q, lengths_Q) * rows.values

    def shares(self, total_Q: Floats) -> Floats:
        """Return 1 / (sum of a row + the smoothing); 0 for an empty row."""
        divisor_Q = total_Q + self.settings.smoothing
        return np.divide(1.0, divisor_Q, out=np.zeros_like(divisor_Q), where=divisor_Q > 0)


def count_pairs(
    histories: SeenItems, rows_E: Ints, n_items: int, window: int
) -> tuple[Ints, Floats]:
    """Count the pairs of items of each history that are at most ``window`` positions apart.

    Args:
        histories: Items of E users, oldest first.
        rows_E: (E,) the row that a history counts in; several histories can share a row.
        n_items: Number of items N.
        window: Largest distance.

    Returns:
        (X,) keys (row * N + earlier item) * N + later item, ascending, and (X,) the sums of
        1 / distance.
    """
    lengths_E = np.diff(histories.offsets)
    row_I, user_I = np.repeat(rows_E, lengths_E), np.repeat(np.arange(len(histories)), lengths_E)
    return _sum_pairs(histories.items, user_I, row_I, np.arange(len(user_I)), n_items, window)


def _sum_pairs(
    items_I: Ints, user_I: Ints, row_I: Ints, positions: Ints, n_items: int, window: int
) -> tuple[Ints, Floats]:
    """Return the counts of :func:`count_pairs` whose earlier item has one of some positions."""
    key_X, value_X = np.zeros(0, np.int64), np.zeros(0)
    for distance in range(1, window + 1):
        inside = positions[positions < len(user_I) - distance]
        earlier = inside[user_I[inside] == user_I[inside + distance]]
        keys = (row_I[earlier] * n_items + items_I[earlier]) * n_items + items_I[earlier + distance]
        values = np.concatenate([value_X, np.full(len(earlier), 1 / distance)])
        key_X, value_X = sum_by_key(np.concatenate([key_X, keys]), values)
    return key_X, value_X


def _block_ends(ends_N: Ints, size: int) -> Ints:
    """Return the ends of blocks of whole items, each of about ``size`` positions."""
    last = len(ends_N) - 1
    borders = np.arange(size, ends_N[last] + size, size)
    return np.unique(ends_N[np.minimum(np.searchsorted(ends_N, borders), last)])


def sum_by_key(keys: Ints, values: Floats) -> tuple[Ints, Floats]:
    """Sum the values of equal keys; return the keys in ascending order, and the sums.

    Keys that are dense between the least and the largest one are counted without sorting. The sums
    have the same bits either way: values are added in their order.
    """
    if not len(keys):
        return keys, np.zeros(0)
    least = int(keys.min())
    size = int(keys.max()) - least + 1
    if size > _SPREAD * len(keys):
        unique, place = np.unique(keys, return_inverse=True)
        sums: Floats = np.bincount(place, values, len(unique)).astype(np.float64)
        return unique, sums
    place = keys - least
    sums = np.bincount(place, values, size).astype(np.float64)
    present = np.flatnonzero(np.bincount(place, minlength=size))
    return present + least, sums[present]
