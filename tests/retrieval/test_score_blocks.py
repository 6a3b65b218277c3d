from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.ranking import rank
from retrieval.registry import make_index
from retrieval.score_blocks import rank_scores, top_scores
from tests.retrieval import brute
from tests.retrieval.brute import make_seen


class Blocks:
    """Scores of a (U, N) matrix, block by block; the blocks asked for are noted."""

    def __init__(self, scores_UN: npt.NDArray[Any], *, as_torch: bool = False) -> None:
        self.scores_UN = scores_UN
        self.as_torch = as_torch
        self.calls: list[tuple[int, int, int, int]] = []

    def __call__(self, rows: slice, begin: int, end: int) -> Any:
        self.calls.append((rows.start, rows.stop, begin, end))
        block = self.scores_UN[rows, begin:end]
        return torch.from_numpy(block.copy()).requires_grad_() if self.as_torch else block


def test_by_hand() -> None:
    blocks = Blocks(np.array([[9.0, 1, 5, 7, 5], [0, 0, 0, 0, 1]]))
    ranks = rank_scores(blocks, np.array([2, 0]), 5, make_seen([[0, 0], []]), block=(1, 3))
    assert ranks.kept.tolist() == [4, 5]
    assert ranks.filtered.tolist() == [3, 5]
    assert blocks.calls == [(0, 1, 0, 3), (0, 1, 3, 5), (1, 2, 0, 3), (1, 2, 3, 5)]
    scores, items = top_scores(blocks, 2, 5, 3, make_seen([[0], [1, 2, 3]]))
    assert items.tolist() == [[3, 2, 4], [4, 0, -1]]
    assert scores.tolist() == [[7, 5, 5], [1, 0, -np.inf]]


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    users=st.integers(0, 9),
    count=st.integers(1, 120),
    k=st.integers(1, 40),
    block=st.tuples(st.integers(1, 10), st.integers(1, 130)),
    dtype=st.sampled_from(["f4", "f8", "i8"]),
    levels=st.sampled_from([2, 8, 10**6]),
)
def test_ranks_and_lists_match_a_full_sort(
    seed: int, users: int, count: int, k: int, block: tuple[int, int], dtype: str, levels: int
) -> None:
    rng = np.random.default_rng(seed)
    scores_UN = rng.integers(-levels, levels, (users, count)).astype(dtype)
    targets, lists = rng.integers(0, count, users), brute.seen_lists(rng, users, count, 40)
    gone = [*map(set, lists)]
    for as_torch in (False, dtype != "i8"):
        blocks = Blocks(scores_UN, as_torch=as_torch)
        ranks = rank_scores(blocks, torch.from_numpy(targets), count, make_seen(lists), block=block)
        kept, filtered = brute.ranks(scores_UN.astype(np.float64), targets, gone)
        np.testing.assert_array_equal(ranks.kept, kept)
        np.testing.assert_array_equal(ranks.filtered, filtered)
        plain = rank_scores(blocks, targets, count, block=block)
        np.testing.assert_array_equal(plain.filtered, kept)
        expected = brute.top(scores_UN.astype(np.float64), k, gone)
        scores, items = top_scores(blocks, users, count, k, make_seen(lists), block=block)
        assert items.tolist() == expected[0]
        np.testing.assert_array_equal(scores, expected[1])


def test_an_inner_product_gives_the_ranks_and_lists_of_the_index() -> None:
    rng = np.random.default_rng(1)
    queries, items = (brute.vectors("integers", rng, rows, 6) for rows in (50, 700))
    targets, seen = rng.integers(0, 700, 50), make_seen(brute.seen_lists(rng, 50, 700, 30))
    blocks = Blocks(queries @ items.T)
    ranks, expected = rank_scores(blocks, targets, 700, seen), rank(queries, items, targets, seen)
    np.testing.assert_array_equal(ranks.kept, expected.kept)
    np.testing.assert_array_equal(ranks.filtered, expected.filtered)
    for left, right in zip(
        top_scores(blocks, 50, 700, 9, seen),
        make_index("torch", items).search(queries, 9, seen),
        strict=True,
    ):
        np.testing.assert_array_equal(left, right)


def test_a_large_catalogue_is_ranked_a_few_users_at_a_time() -> None:
    calls: list[int] = []

    def score(rows: slice, begin: int, end: int) -> torch.Tensor:
        calls.append((rows.stop - rows.start) * 2**23)
        return torch.zeros(rows.stop - rows.start, end - begin)

    ranks = rank_scores(score, np.zeros(5, np.int64), 2**23, block=None)
    assert ranks.kept.tolist() == [2**23] * 5
    assert max(calls) <= 2**25


def test_what_cannot_be_ranked_is_refused() -> None:
    good, nan = Blocks(np.ones((2, 3))), Blocks(np.full((2, 3), np.nan))
    targets = np.array([0, 1])
    cases: list[tuple[Any, str]] = [
        (lambda: rank_scores(nan, targets, 3), "users 0..1 and items 0..2 hold NaN"),
        (lambda: rank_scores(good, targets, 4), r"shape \(2, 3\)"),
        (lambda: rank_scores(good, np.array([0, 3]), 3), "target 3 of row 1"),
        (lambda: rank_scores(good, targets, 3, make_seen([[0]])), "exclude covers 1 users"),
        (lambda: rank_scores(good, targets, 3, block=(0, 1)), "block is"),
        (lambda: top_scores(good, 2, 3, 0), "k is 0"),
        (lambda: top_scores(Blocks(np.full((2, 3), 1e300)), 2, 3, 1), "float32"),
        (lambda: top_scores(good, 2, 0, 1), "empty"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
