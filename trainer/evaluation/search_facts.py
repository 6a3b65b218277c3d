"""Describe the way in which an index searched: its choice, or the recall of an approximate one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from features.dataset import Dataset, EvalSplit
from features.errors import UserError
from retrieval.approximate_indexes import ApproximateIndex, recall
from retrieval.flat_index import FaissIndex
from retrieval.index_options import IndexNameError
from retrieval.indexes import Index

SAMPLE_SIZE = 100
"""Most queries on which an approximate index is compared with an exact one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchFacts:
    """The way in which an index searched."""

    line: str
    """One line for people; empty if there is nothing to tell."""
    recall: dict[str, float] = field(default_factory=dict)
    """``recall@K`` -> share of the K best items that an approximate index finds, on a sample; empty
    for an exact index."""


@contextmanager
def unusable_index() -> Iterator[None]:
    """Turn the name of an index that cannot be used into an error of the user.

    Raises:
        UserError: The index is unknown, or a parameter does not fit the catalogue.
    """
    try:
        yield
    except IndexNameError as error:
        raise UserError(str(error)) from None


def describe_approximate(index: Index, queries: Tensor, k: int) -> SearchFacts:
    """Return the parameters of an approximate index and its recall@k on some queries.

    Args:
        index: An :class:`retrieval.approximate_indexes.ApproximateIndex`.
        queries: (U, D) fp32, at least one.
        k: Length of the lists; at most the number of items counts.
    """
    assert isinstance(index, ApproximateIndex)
    k = min(k, index.item_count)
    share = recall(index, FaissIndex(index.item_ND), queries, k)
    values = ", ".join(f"{key}={value}" for key, value in index.values.items())
    origin = "read from the run's folder" if index.is_reused else "trained now"
    measured = f"recall@{k} {share:.3f} against flat search on {len(queries)} queries"
    line = f"{values}; {measured}; {origin}"
    return SearchFacts(line=line, recall={f"recall@{k}": share})


def sample_users(dataset: Dataset) -> EvalSplit:
    """Return up to 100 users with all their interactions as histories."""
    offsets = dataset.offsets
    users = np.flatnonzero(np.diff(offsets) > 0)
    if len(users):
        users = np.unique(users[np.linspace(0, len(users) - 1, SAMPLE_SIZE).astype(np.int64)])
    return EvalSplit(users=users, starts=offsets[users], targets=offsets[users + 1])
