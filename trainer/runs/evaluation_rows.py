"""Rows of the result tables of an evaluation: metrics with intervals, and predictions."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.dataset import Dataset
from retrieval.list_metrics import list_metrics
from retrieval.metrics import UNRANKED, per_user
from retrieval.ranking import Ranks
from retrieval.significance import bootstrap
from trainer.evaluation.ranking import SplitRanks


def subsets(
    ranks: Ranks, others: Mapping[str, npt.NDArray[np.bool_]]
) -> dict[str, npt.NDArray[np.bool_]]:
    """Return the users of each subset of targets that is not empty.

    Without repeated targets, ``new`` would equal ``all`` and is left out.

    Args:
        ranks: (E,) ranks of all evaluated users.
        others: Name of a further subset -> (E,) its users.
    """
    is_repeated = ranks.filtered == UNRANKED
    every = {"all": np.ones_like(is_repeated)}
    if is_repeated.any():
        every |= {"new": ~is_repeated, "repeated": is_repeated}
    return {name: subset for name, subset in {**every, **others}.items() if subset.any()}


def split_rows(
    dataset: Dataset,
    split: str,
    by_ranker: Mapping[str, SplitRanks],
    by_subset: Mapping[str, npt.NDArray[np.bool_]],
) -> list[dict[str, Any]]:
    """Return the rows of all subsets of the targets of a split.

    Args:
        dataset: The dataset.
        split: ``validation`` or ``test``.
        by_ranker: Ranker -> its ranks.
        by_subset: Subset of the targets -> (E,) its users.
    """
    rows = []
    for targets, subset in by_subset.items():
        for name, split_ranks in by_ranker.items():
            rows += metric_rows(split, targets, name, split_ranks.ranks, subset)
            if targets == "all":
                rows += list_rows(dataset, split, name, split_ranks)
    return rows


def metric_rows(
    split: str,
    targets: str,
    ranker: str,
    ranks: Ranks,
    subset: npt.NDArray[np.bool_],
    *,
    users: npt.NDArray[np.int64] | None = None,
) -> list[dict[str, Any]]:
    """Return rows of the metrics table for some users of one split.

    Repeated targets have rows with seen items kept only: filtered, they are all missed.

    Args:
        split: ``validation`` or ``test``.
        targets: Name of the subset.
        ranker: Name of the model that ranked.
        ranks: (E,) ranks of all evaluated users.
        subset: (E,) bool, the users to average over, at least one.
        users: (E,) user of each rank if users have several; the intervals resample the users.
    """
    rows = []
    for seen, seen_ranks in (("filtered", ranks.filtered), ("kept", ranks.kept)):
        if targets == "repeated" and seen == "filtered":
            continue
        values = per_user(seen_ranks[subset])
        matrix = np.stack(list(values.values()), axis=1)
        low, high = bootstrap(matrix, groups=None if users is None else users[subset])
        rows += [
            {
                "phase": "eval", "epoch": 0, "split": split, "targets": targets, "ranker": ranker,
                "seen": seen, "metric": metric, "value": float(matrix[:, i].mean()),
                "low": float(low[i]), "high": float(high[i]), "users": len(matrix),
            }
            for i, metric in enumerate(values)
        ]  # fmt: skip
    return rows


def list_rows(
    dataset: Dataset,
    split: str,
    ranker: str,
    ranked: SplitRanks,
    is_current_N: npt.NDArray[np.bool_] | None = None,
) -> list[dict[str, Any]]:
    """Return the rows about the items of all users' lists; they have no intervals.

    Args:
        dataset: The dataset, for the training interactions of the items.
        split: ``validation`` or ``test``.
        ranker: Name of the model that ranked.
        ranked: The ranks of the split, with counted lists.
        is_current_N: The items of the catalogue; ``None``: all N items of the dataset.
    """
    rows = slice(None) if is_current_N is None else is_current_N
    counts_N, cold_N = dataset.train_counts[rows], dataset.cold[rows]
    return [
        {
            "phase": "eval", "epoch": 0, "split": split, "targets": "all", "ranker": ranker,
            "seen": seen, "metric": metric, "value": value, "low": None, "high": None,
            "users": len(ranked.users.users),
        }
        for seen, lists_N in ranked.recommended.items()
        for metric, value in list_metrics(lists_N[rows], counts_N, cold_N).items()
    ]  # fmt: skip


def prediction_columns(
    dataset: Dataset, split: str, ranked: SplitRanks, is_cold: npt.NDArray[np.bool_]
) -> pa.Table:
    """Return the predictions of one split, without the ids of users and items."""
    users = ranked.users
    return pa.table(
        {
            "split": pa.array([split] * len(users.users)),
            "user": pa.array(users.users, pa.int32()),
            "item": pa.array(dataset.items[users.targets]),
            "history": pa.array(users.targets - users.starts, pa.int32()),
            "cold": pa.array(is_cold),
            "rank_kept": pa.array(ranked.ranks.kept, pa.int32()),
            "rank_filtered": pa.array(
                ranked.ranks.filtered, pa.int32(), mask=ranked.ranks.filtered == UNRANKED
            ),
        }
    )
