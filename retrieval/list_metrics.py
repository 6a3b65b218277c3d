"""Metrics of the recommended items: how many, how novel and how cold the items of the lists are.

They need no targets. The lists enter as counts: how many lists recommend each item.

Shape suffixes: U users, K items of a list, N items.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from retrieval.seen_items import SeenItems

Counts = npt.NDArray[np.int64]
ListMetric = Callable[[Counts, Counts, npt.NDArray[np.bool_]], float]

SearchLists = Callable[[Counts, SeenItems | None, int], Counts]
"""Function of rows of users (B,), the items to leave out for each of them and K, which returns the
best items of each: (B, K), -1 after the last item of a list that is too short."""

LIST_LENGTH = 10
"""Items of each list."""


def search_both(search: SearchLists, seen: SeenItems, n_items: int) -> dict[str, Counts]:
    """Return the lists of all users with seen items filtered and kept, mostly by one search.

    One search for twice the length gives both lists of a user if at most half of the items are
    seen. Other users are searched again without their seen items.

    Args:
        search: The search.
        seen: Seen items of each user.
        n_items: Number of items N.

    Returns:
        ``filtered`` and ``kept`` -> (U, 10) items.
    """
    users = np.arange(len(seen))
    items_UK = search(users, None, 2 * LIST_LENGTH)
    row_Q, item_Q = seen.pairs(0, len(seen), n_items)
    key_UK = np.where(items_UK < 0, -1, users[:, None] * n_items + items_UK)
    is_seen_UK = np.isin(key_UK, row_Q * n_items + item_Q)
    order_UK = np.argsort(is_seen_UK, axis=1, kind="stable")[:, :LIST_LENGTH]
    filtered_UK = np.take_along_axis(items_UK, order_UK, axis=1)
    again = np.flatnonzero(is_seen_UK.sum(axis=1) > LIST_LENGTH)
    if len(again):
        filtered_UK[again] = search(again, seen.take(again), LIST_LENGTH)
    return {"filtered": filtered_UK, "kept": items_UK[:, :LIST_LENGTH]}


def count_recommended(items_UK: Counts, n_items: int) -> Counts:
    """Return the number of lists that recommend each item: (N,).

    Args:
        items_UK: The lists; -1 after the last item of a list that is too short.
        n_items: Number of items N.
    """
    return np.bincount(items_UK[items_UK >= 0], minlength=n_items).astype(np.int64)


def coverage(lists_N: Counts, popularity_N: Counts, is_cold_N: npt.NDArray[np.bool_]) -> float:
    """Return the share of the catalogue that at least one list recommends."""
    return float((lists_N > 0).mean())


def novelty(lists_N: Counts, popularity_N: Counts, is_cold_N: npt.NDArray[np.bool_]) -> float:
    """Return the mean self-information of the recommended items, in bits.

    The self-information of an item is -log2(its interactions / all interactions) (Zhou et al.,
    PNAS 2010; Vargas and Castells, RecSys 2011, by shares of users). It is infinite without
    interactions. Such an item counts as one with a single interaction, as in RecTools
    (``MeanInvUserFreq``).
    """
    if not lists_N.any():
        return 0.0
    information_N = np.log2(max(popularity_N.sum(), 1) / np.maximum(popularity_N, 1))
    return float((lists_N * information_N).sum() / lists_N.sum())


def cold_share(lists_N: Counts, popularity_N: Counts, is_cold_N: npt.NDArray[np.bool_]) -> float:
    """Return the share of cold items among the recommended items; an item counts in each list."""
    return float(lists_N[is_cold_N].sum() / max(lists_N.sum(), 1))


LIST_METRICS: dict[str, ListMetric] = {
    f"{metric.__name__}@{LIST_LENGTH}": metric for metric in (coverage, novelty, cold_share)
}
"""All metrics of the recommended items, by the name in tables. They have no value per user."""


def list_metrics(
    lists_N: Counts, popularity_N: Counts, is_cold_N: npt.NDArray[np.bool_]
) -> dict[str, float]:
    """Return every metric of :data:`LIST_METRICS`.

    Args:
        lists_N: (N,) lists that recommend each item, see :func:`count_recommended`.
        popularity_N: (N,) training interactions of each item.
        is_cold_N: (N,) bool, true for cold items.

    Examples:
        Two lists of items 0, 1 and 0, 2; item 2 has no interactions and is cold:

        >>> lists = count_recommended(np.array([[0, 1], [0, 2]]), 4)
        >>> list_metrics(lists, np.array([4, 2, 0, 2]), np.array([False, False, True, False]))
        {'coverage@10': 0.75, 'novelty@10': 1.75, 'cold_share@10': 0.25}
    """
    return {name: metric(lists_N, popularity_N, is_cold_N) for name, metric in LIST_METRICS.items()}
