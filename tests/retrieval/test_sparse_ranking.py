"""Ranks by sparse scores equal those of a dense reference."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.ranking import rank
from retrieval.sparse_ranking import rank_sparse
from retrieval.sparse_scores import SparseScores
from tests.retrieval import brute


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    users=st.integers(0, 9),
    items=st.integers(1, 7),
    block=st.integers(1, 4),
)
def test_ranks_are_those_of_the_dense_scores(seed: int, users: int, items: int, block: int) -> None:
    """Scores are positive, negative and 0, with ties; seen items repeat and hold some targets."""
    rng = np.random.default_rng(seed)
    dense_UN = rng.integers(-2, 3, (users, items)) / 4
    scores = SparseScores.from_dense(dense_UN)
    targets = rng.integers(0, items, users)
    lists = brute.seen_lists(rng, users, items, most=4)
    seen = brute.make_seen(lists)

    ranks = rank_sparse(
        lambda rows: scores.rows(rows.start, rows.stop), targets, items, seen, block=block
    )
    kept, filtered = brute.ranks(dense_UN, targets, [set(row) for row in lists])
    np.testing.assert_array_equal(ranks.kept, kept)
    np.testing.assert_array_equal(ranks.filtered, filtered)

    zeros = np.zeros((users, 1), np.float32), np.zeros((items, 1), np.float32)
    if users:
        by_correction = rank(*zeros, targets, seen, correction=scores)
        np.testing.assert_array_equal(ranks.filtered, by_correction.filtered)


def test_without_seen_items_both_ranks_are_equal() -> None:
    scores = SparseScores.from_dense(np.array([[0.5, 0.0, 0.25, 0.0]]))
    for target, expected in ((0, 1), (2, 2), (1, 4)):
        ranks = rank_sparse(lambda rows: scores, np.array([target]), 4)
        assert ranks.kept.tolist() == ranks.filtered.tolist() == [expected]


def test_scores_of_another_shape_are_refused() -> None:
    scores = SparseScores.from_dense(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="users"):
        rank_sparse(lambda rows: scores, np.array([0]), 4)
