"""Ranking metrics for one target per user. A metric returns a value per user; callers average.

With one target, HR@k (the target is among the first k) and Recall@k (the share of targets among the
first k) are equal, and precision@k is the same divided by k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

PerUser = npt.NDArray[np.float64]

UNRANKED = int(np.iinfo(np.int64).max)
"""Rank of a target that is not in the ranking: every metric is 0, whatever the cut-off."""


def hit_rate(ranks: npt.NDArray[np.int64], k: int) -> PerUser:
    """Return HR@k: (U,) 1.0 where rank <= k, else 0.0. With one target it equals Recall@k."""
    return (_ranks(ranks) <= _cutoff(k)).astype(np.float64)


def ndcg(ranks: npt.NDArray[np.int64], k: int) -> PerUser:
    """Return NDCG@k: (U,) 1 / log2(rank + 1) where rank <= k, else 0.

    The ideal list has its one relevant item first. Its gain is 1 / log2(2) = 1, so no further
    normalisation is needed (Jarvelin and Kekalainen 2002). Libraries that divide by the ideal gain
    of k relevant items print a number 4.54 times smaller at k = 10.
    """
    discount = 1 / np.log2(_ranks(ranks) + 1.0)
    return np.where(ranks <= _cutoff(k), discount, 0.0)


def reciprocal_rank(ranks: npt.NDArray[np.int64]) -> PerUser:
    """Return 1 / rank in the full list, 0 if unranked: (U,). The mean over users is MRR."""
    return np.where(_ranks(ranks) == UNRANKED, 0.0, 1.0 / ranks)


METRICS: dict[str, Callable[[npt.NDArray[np.int64], int], PerUser]] = {
    "HR": hit_rate,
    "NDCG": ndcg,
}
"""Metrics with a cut-off, by the name before the @."""
CUTOFFS = (5, 10, 20, 50)
"""The k of HR@k and NDCG@k in every table."""
METRIC_NAMES = (*(f"{name}@{k}" for name in METRICS for k in CUTOFFS), "MRR")
"""All metrics of a table, in the order of :func:`per_user`."""
PRINTED_DECIMALS = 4
"""Decimals of a metric in every table."""


def per_user(ranks: npt.NDArray[np.int64], cutoffs: Sequence[int] = CUTOFFS) -> dict[str, PerUser]:
    """Return every metric of every user: "HR@5", ..., "NDCG@5", ..., "MRR", each (U,) float64.

    Args:
        ranks: (U,) from 1, with seen items filtered or kept; :data:`UNRANKED` for a target that is
            not in the ranking.
        cutoffs: The k of HR@k and NDCG@k.

    Raises:
        ValueError: A rank or a cut-off is below 1, or the ranks are not (U,) integers.
    """
    table = {f"{name}@{k}": metric(ranks, k) for name, metric in METRICS.items() for k in cutoffs}
    return table | {"MRR": reciprocal_rank(ranks)}


def single_best(values: Sequence[float]) -> int | None:
    """Return the position of the highest value, ``None`` if another one is printed as equal.

    Tables print four decimals and mark the best value; of equal values none is marked.

    Examples:
        >>> single_best([0.25, 0.5, 0.125])
        1
        >>> single_best([0.5, 0.50001, 0.25]) is None
        True
    """
    printed = [round(value, PRINTED_DECIMALS) for value in values]
    best = max(printed, default=0.0)
    return printed.index(best) if printed.count(best) == 1 else None


def _ranks(ranks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    if ranks.dtype.kind not in "iu" or ranks.ndim != 1:
        raise ValueError(f"ranks are {ranks.dtype} of shape {ranks.shape}: expected (U,) integers")
    if len(ranks) and ranks.min() < 1:
        raise ValueError(f"the smallest rank is {ranks.min()}: ranks start at 1")
    return ranks


def _cutoff(k: int) -> int:
    if k < 1:
        raise ValueError(f"cut-off {k}: it must be at least 1")
    return k
