import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.blocks import strict_fp32
from retrieval.exact_scores import TargetScores, error_bound, exact_scores, row_norms
from retrieval.index_ranking import rank_with
from retrieval.metrics import UNRANKED, per_user
from retrieval.ranking import Ranks, rank
from retrieval.score_blocks import rank_scores
from retrieval.seen_items import SeenItems
from tests.retrieval import brute
from tests.retrieval.brute import EXACT, Floats, Ints, make_seen


def same(found: Ranks, expected: tuple[Ints, Ints]) -> None:
    np.testing.assert_array_equal(found.kept, expected[0])
    np.testing.assert_array_equal(found.filtered, expected[1])
    assert found.kept.dtype == found.filtered.dtype == np.int64


def one_dimension(scores: list[float]) -> Floats:
    return np.array(scores, np.float32)[:, None]


def test_ranks_by_hand() -> None:
    # Query 1: the score of item j is its only coordinate. The target, item 2, scores 5; items 0
    # and 3 score more, item 4 the same, item 1 less.
    items = one_dimension([9, 1, 5, 7, 5])
    found = rank(
        np.ones((3, 1), np.float32),
        items,
        np.array([2, 2, 1]),
        make_seen([[0, 0, 1, 4], [], [0, 2, 3, 4]]),
    )
    # User 0 has seen 0 (twice), 1 and 4: only item 3 is left above the target.
    same(found, (np.array([4, 4, 5]), np.array([2, 4, 1])))


def test_a_target_that_the_user_has_seen_is_unranked_when_seen_items_are_filtered() -> None:
    items = one_dimension([9, 1, 5, 7, 5])
    targets = np.array([2, 0, 1, 3])
    seen = make_seen([[2, 4, 2], [0], [0, 2], []])
    expected = (np.array([4, 1, 5, 2]), np.array([UNRANKED, UNRANKED, 3, 2]))
    queries = np.ones((4, 1), np.float32)
    same(rank(queries, items, targets, seen), expected)
    for name in EXACT:
        same(rank_with(name, queries, items, targets, seen), expected)
    scores = queries @ items.T
    same(rank_scores(lambda rows, begin, end: scores[rows, begin:end], targets, 5, seen), expected)
    assert [set(metric[:2]) for metric in per_user(expected[1]).values()] == [{0.0}] * 9


def test_ties_count_against_the_model() -> None:
    items, targets = np.ones((6, 4), np.float32), np.array([0, 5])
    found = rank(np.ones((2, 4), np.float32), items, targets, make_seen([[1, 2], [4, 4]]))
    same(found, (np.array([6, 6]), np.array([4, 5])))


@pytest.mark.parametrize("kind", brute.KINDS)
@pytest.mark.parametrize("query_kind", ["gauss", "integers", "near", "zero"])
def test_ranks_match_the_definition(kind: str, query_kind: str) -> None:
    rng = np.random.default_rng(7)
    for users, count, dim in [(4, 90, 33), (3, 33, 1), (2, 1, 5), (6, 65, 3)]:
        queries = brute.vectors(query_kind, rng, users, dim)
        items = brute.vectors(kind, rng, count, dim)
        targets = rng.integers(0, count, users)
        lists = brute.seen_lists(rng, users, count, 30)
        lists[0].append(int(targets[0]))
        expected = brute.ranks(brute.all_scores(queries, items), targets, [*map(set, lists)])
        same(rank(queries, items, targets, make_seen(lists)), expected)
        same(rank(queries, items, targets), (expected[0], expected[0]))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kinds=st.tuples(st.sampled_from(brute.KINDS), st.sampled_from(brute.KINDS)),
    users=st.integers(0, 9),
    count=st.integers(1, 150),
    dim=st.integers(1, 40),
    block=st.tuples(st.integers(1, 10), st.integers(1, 160)),
)
def test_ranks_do_not_depend_on_the_block(
    seed: int,
    kinds: tuple[str, str],
    users: int,
    count: int,
    dim: int,
    block: tuple[int, int],
) -> None:
    rng = np.random.default_rng(seed)
    queries = brute.vectors(kinds[0], rng, users, dim) if users else np.zeros((0, dim), np.float32)
    items = brute.vectors(kinds[1], rng, count, dim)
    targets = rng.integers(0, count, users)
    seen = make_seen(brute.seen_lists(rng, users, count, 40))
    whole = rank(queries, items, targets, seen, block=(max(1, users), count))
    found = rank(queries, items, targets, seen, block=block)
    same(found, (whole.kept, whole.filtered))
    is_ranked = whole.filtered != UNRANKED
    assert (whole.filtered <= whole.kept)[is_ranked].all()
    np.testing.assert_array_equal(is_ranked, ~seen.contain(targets))
    assert (whole.filtered >= 1).all()
    assert (whole.kept <= count).all()


def test_close_calls_are_not_left_to_fp32() -> None:
    rng = np.random.default_rng(3)
    queries, items = brute.vectors("gauss", rng, 8, 256), brute.vectors("near", rng, 64, 256)
    targets = rng.integers(0, 64, 8)
    scores = brute.all_scores(queries, items)
    expected = brute.ranks(scores, targets, [set()] * 8)
    naive = brute.ranks((queries @ items.T).astype(np.float64), targets, [set()] * 8)
    assert (naive[0] != expected[0]).any()
    same(rank(queries, items, targets), expected)


@pytest.mark.parametrize(
    ("query_kind", "kind", "most"),
    [
        ("gauss", "equal", 0),
        ("gauss", "near", 1500),
        ("gauss", "duplicates", 400),
        ("zero", "gauss", 9000),
        ("integers", "integers", 9000),
    ],
)
def test_a_collapsed_model_is_ranked_through_float64(
    query_kind: str, kind: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Enough close calls in a tile to leave the usual way; few of them are then settled one by one.
    rng = np.random.default_rng(5)
    queries = brute.vectors(query_kind, rng, 40, 2)
    items = brute.vectors(kind, rng, 200, 2)
    targets = rng.integers(0, 200, 40)
    lists = brute.seen_lists(rng, 40, 200, 50)
    expected = brute.ranks(brute.all_scores(queries, items), targets, [*map(set, lists)])
    settled = 0
    at_least = TargetScores.at_least

    def counting(scores: TargetScores, user_P: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        nonlocal settled
        settled += len(user_P)
        return at_least(scores, user_P, *rest)

    monkeypatch.setattr(TargetScores, "at_least", counting)
    same(rank(queries, items, targets, make_seen(lists)), expected)
    assert settled <= most


def test_reduced_precision_decides_nothing() -> None:
    rng = np.random.default_rng(11)
    queries, items = (torch.from_numpy(brute.vectors("gauss", rng, n, 64)) for n in (16, 500))
    targets = rng.integers(0, 500, 16)
    expected = rank(queries, items, targets)
    queries.requires_grad_()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        inside = torch.backends.cuda.matmul.fp32_precision
        with torch.autocast("cpu", torch.bfloat16):
            assert (queries @ items.T).dtype == torch.bfloat16
            found = rank(queries, items, targets)
        assert torch.backends.cuda.matmul.fp32_precision == inside
        with strict_fp32(torch.device("cpu")):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
    same(found, (expected.kept, expected.filtered))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", brute.KINDS)
def test_cuda_ranks_like_the_cpu(kind: str) -> None:
    rng = np.random.default_rng(2)
    queries, items = brute.vectors("gauss", rng, 64, 96), brute.vectors(kind, rng, 3000, 96)
    targets, seen = rng.integers(0, 3000, 64), make_seen(brute.seen_lists(rng, 64, 3000, 40))
    expected = rank(queries, items, targets, seen)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        on_device = torch.from_numpy(queries).cuda(), torch.from_numpy(items).cuda()
        found = rank(*on_device, torch.from_numpy(targets).cuda(), seen)
    finally:
        torch.set_float32_matmul_precision(before)
    same(found, (expected.kept, expected.filtered))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kinds=st.tuples(st.sampled_from(brute.KINDS), st.sampled_from(brute.KINDS)),
    dim=st.integers(1, 300),
)
def test_the_error_bound_holds_and_the_canonical_score_is_one(
    seed: int, kinds: tuple[str, str], dim: int
) -> None:
    rng = np.random.default_rng(seed)
    left, right = brute.vectors(kinds[0], rng, 5, dim), brute.vectors(kinds[1], rng, 7, dim)
    true = brute.all_scores(left, right)
    lengths = [row_norms("rows", torch.from_numpy(side)) for side in (left, right)]
    for roundoff, dtype in [(2.0**-24, np.float32), (2.0**-53, np.float64)]:
        bound = error_bound(dim, lengths[0][:, None], lengths[1][None], roundoff).numpy()
        assert (np.abs(left.astype(dtype) @ right.T.astype(dtype) - true) <= bound).all()
        pairs = torch.cartesian_prod(torch.arange(5), torch.arange(7))
        exact = exact_scores(torch.from_numpy(left), torch.from_numpy(right), *pairs.T)
        assert (np.abs(exact.numpy().reshape(5, 7) - true) <= bound).all()
    alone = [
        exact_scores(torch.from_numpy(left), torch.from_numpy(right), *pair[:, None])
        for pair in pairs
    ]
    assert torch.equal(torch.cat(alone), exact)


def test_ranks_by_one_score_per_item_by_hand() -> None:
    popularity = one_dimension([5, 9, 5, 1, 5])
    seen = make_seen([[2, 2, 1], [0, 1, 2], [3]])
    ranks = rank(np.ones((3, 1), np.float32), popularity, np.array([0, 3, 1]), seen)
    same(ranks, (np.array([4, 5, 1]), np.array([2, 2, 1])))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), users=st.integers(0, 9), count=st.integers(1, 60))
def test_ranks_by_one_score_per_item_are_exact(seed: int, users: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 8, count)
    targets = rng.integers(0, count, users)
    lists = brute.seen_lists(rng, users, count, 20)
    expected = brute.ranks(np.tile(scores, (users, 1)), targets, [*map(set, lists)])
    same(
        rank(
            np.ones((users, 1), np.float32),
            one_dimension(scores.tolist()),
            targets,
            make_seen(lists),
        ),
        expected,
    )


def test_seen_takes_rows_in_any_order() -> None:
    seen = make_seen([[4, 1], [], [7, 7, 2], [3]])
    taken = seen.take(np.array([2, 1, 0, 2]))
    assert taken.items.tolist() == [7, 7, 2, 4, 1, 7, 7, 2]
    assert taken.offsets.tolist() == [0, 3, 3, 5, 8]
    rows, items = seen.pairs(1, 4, 10)
    assert list(zip(rows.tolist(), items.tolist(), strict=True)) == [(1, 2), (1, 7), (2, 3)]


def test_read_only_and_strided_vectors_are_welcome() -> None:
    rng = np.random.default_rng(0)
    items = brute.vectors("gauss", rng, 30, 8)
    items.flags.writeable = False
    queries = brute.vectors("gauss", rng, 4, 16)[:, ::2]
    targets = np.arange(4, dtype=np.int32)
    expected = brute.ranks(brute.all_scores(queries, items), targets.astype(np.int64), [set()] * 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(rank(queries, items, targets.astype(np.int64)), expected)
    transposed = torch.from_numpy(items.T.copy()).T
    same(rank(torch.from_numpy(queries.copy()), transposed, targets.astype(np.int64)), expected)


E2 = np.eye(2, dtype=np.float32)
ONE, NAN = np.array([0, 1]), np.array([[1, np.nan], [0, 1]], np.float32)


@pytest.mark.parametrize(
    ("queries", "items", "targets", "seen", "message"),
    [
        (E2.astype(np.float64), E2, ONE, None, "queries are torch.float64"),
        (E2[0], E2, ONE, None, r"queries have shape \(2,\)"),
        (E2[:, :1], E2, ONE, None, "1 dimensions but items have 2"),
        (E2, E2[:0], ONE, None, "items are empty"),
        (E2, E2, np.array([0, 2]), None, r"target 2 of row 1 is outside 0\.\.1"),
        (E2, E2, np.array([-1, 0]), None, "target -1 of row 0"),
        (E2, E2, np.array([0]), None, "1 targets but 2 users"),
        (E2, E2, np.array([0.0, 1.0]), None, "targets are float64"),
        (NAN, E2, ONE, None, "queries row 0 holds NaN"),
        (E2, np.full_like(E2, np.inf), ONE, None, "items row 0 holds NaN or infinity"),
        (E2 * np.float32(1e30), E2 * np.float32(1e30), ONE, None, "more than float32 holds"),
        (E2, E2, ONE, make_seen([[0]]), "exclude covers 1 users but there are 2"),
        (E2, E2, ONE, make_seen([[0], [2]]), r"exclude holds items 0\.\.2, outside 0\.\.1"),
    ],
)
def test_what_cannot_be_ranked_is_refused(
    queries: Floats, items: Floats, targets: Ints, seen: SeenItems | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        rank(queries, items, targets, seen)
    assert "\n" not in str(caught.value)


def test_malformed_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="block is"):
        rank(E2, E2, ONE, block=(0, 4))
    for items, offsets, message in [
        ([0, 1], [0, 1], "run from 0 to 2"),
        ([0, 1], [1, 2], "run from 0 to 2"),
        ([0, 1], [0, 2, 1, 2], "decrease"),
    ]:
        with pytest.raises(ValueError, match=message):
            SeenItems(items=np.array(items), offsets=np.array(offsets))
    with pytest.raises(ValueError, match="int64"):
        SeenItems(items=np.array([0.5]), offsets=np.array([0, 1]))
