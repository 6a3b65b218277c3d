"""Transitions: counts of item to later item in the training histories.

A reference without gradients: on Amazon Beauty it is above several published networks. The count of
a pair of items d positions apart (d <= ``window``) grows by 1/d. A row is divided by the sum of the
row + ``smoothing``. A user's score of an item is the sum over the last ``length`` items of the
history of the item's entry in their rows, the newest row with weight 1, the one before it 1/2, and
so on. The own transitions of a training user are among the counts; those of the held-out items are
not.

Legend: N items, E users, X entries of the counts, P entries of the scores.
"""

from dataclasses import dataclass

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
        self._counts = _Rows.from_pairs(np.zeros(0, np.int64), np.zeros(0), catalogue.n_items)

    def fit_buffers(self, features: ItemFeatures, train: TrainSet) -> None:
        """Count the transitions of the training histories."""
        n_items = len(self.zero_N1)
        counts = count_transitions(train.histories, n_items, self.settings.window)
        totals = np.bincount(
            np.repeat(np.arange(n_items), np.diff(counts.offsets)), counts.values, n_items
        )
        divisor = np.repeat(totals + self.settings.smoothing, np.diff(counts.offsets))
        self._counts = _Rows(counts.items, counts.offsets, counts.values / divisor)

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
        n_items = len(self.zero_N1)
        keys, values = [], []
        ends, lengths = histories.offsets[1:], np.diff(histories.offsets)
        for age in range(self.settings.length):
            users = np.flatnonzero(lengths > age)
            rows = self._counts.take(histories.items[ends[users] - 1 - age])
            row_users = np.repeat(users, np.diff(rows.offsets))
            keys.append(row_users * n_items + rows.items)
            values.append(rows.values / (age + 1))
        key_P, value_P = sum_by_key(np.concatenate(keys), np.concatenate(values))
        counts = np.bincount(key_P // n_items, minlength=len(histories))
        return SparseScores(
            items=key_P % n_items,
            offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            values=value_P,
        )


@dataclass(frozen=True, slots=True)
class _Rows:
    """A sparse matrix (N x N) as compressed rows."""

    items: Ints
    offsets: Ints
    values: Floats

    @classmethod
    def from_pairs(cls, key_X: Ints, value_X: Floats, n_items: int) -> "_Rows":
        """Return the matrix of entries with the keys row * N + column, ascending."""
        counts = np.bincount(key_X // n_items, minlength=n_items)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return cls(key_X % n_items, offsets, value_X)

    def take(self, rows: Ints) -> "_Rows":
        """Return some rows, one after the other."""
        lengths = np.diff(self.offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        index = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return _Rows(self.items[index], offsets, self.values[index])


def count_transitions(histories: SeenItems, n_items: int, window: int) -> _Rows:
    """Count the pairs of items of each history that are at most ``window`` positions apart.

    Args:
        histories: Items of each user, oldest first.
        n_items: Number of items N.
        window: Largest distance.

    Returns:
        (N x N) sums of 1 / distance: row of the earlier item, column of the later item.
    """
    user_I = np.repeat(np.arange(len(histories)), np.diff(histories.offsets))
    key_X, value_X = np.zeros(0, np.int64), np.zeros(0)
    for distance in range(1, window + 1):
        same_I = user_I[distance:] == user_I[:-distance]
        earlier = histories.items[:-distance][same_I]
        later = histories.items[distance:][same_I]
        keys = np.concatenate([key_X, earlier * n_items + later])
        values = np.concatenate([value_X, np.full(len(earlier), 1 / distance)])
        key_X, value_X = sum_by_key(keys, values)
    return _Rows.from_pairs(key_X, value_X, n_items)


def sum_by_key(keys: Ints, values: Floats) -> tuple[Ints, Floats]:
    """Sum the values of equal keys; return the keys in ascending order, and the sums."""
    unique, place = np.unique(keys, return_inverse=True)
    sums: Floats = np.bincount(place, values, len(unique)).astype(np.float64)
    return unique, sums
