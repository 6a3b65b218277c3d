from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from retrieval.exact_scores import exact_scores
from retrieval.index_ranking import rank_with
from retrieval.ranking import rank
from retrieval.registry import make_index
from retrieval.sparse_scores import SparseScores
from tests.retrieval import brute
from tests.retrieval.brute import EXACT, Floats, Ints, make_seen

Scores = npt.NDArray[np.float64]

E2 = np.eye(2, dtype=np.float32)


def canonical(queries: Floats, items: Floats, values_UN: Scores) -> Scores:
    """(U, N) float64 inner products of every pair plus the dense values."""
    pair = torch.cartesian_prod(torch.arange(len(queries)), torch.arange(len(items)))
    scores = exact_scores(torch.from_numpy(queries), torch.from_numpy(items), *pair.T)
    return scores.numpy().reshape(values_UN.shape) + values_UN


def corrections(
    rng: np.random.Generator, scores_UN: Scores, targets: Ints, lists: list[list[int]]
) -> Scores:
    """Dense values that make ties, meet seen items and targets, and leave some rows empty."""
    users, count = scores_UN.shape
    values_UN = np.zeros((users, count))
    scale = float(np.abs(scores_UN).max(initial=1e-30))
    for row in range(users):
        kind = rng.integers(0, 6)
        chosen = rng.random(count) < rng.choice([0.05, 0.5, 1.0])
        if kind == 0:
            continue
        if kind == 1:  # a bias on the history
            values_UN[row, lists[row]] = -7.4 * scale
        elif kind == 2:  # few distinct values of both signs
            values_UN[row, chosen] = rng.integers(-2, 3, int(chosen.sum())) * scale
        elif kind == 3:  # corrected items tie with the target, or all but tie
            near = scores_UN[row, targets[row]] - scores_UN[row]
            values_UN[row, chosen] = np.nextafter(near, near + rng.integers(-1, 2))[chosen]
        elif kind == 4:  # far larger and far smaller than any inner product
            values_UN[row, chosen] = rng.choice([1e25, -1e25, 1e-40, 1.0], int(chosen.sum()))
        else:
            values_UN[row, chosen] = scale * rng.standard_normal(int(chosen.sum()))
        if rng.random() < 0.5:
            values_UN[row, targets[row]] = rng.choice([-1e25, -scale, scale, 0.0])
    return values_UN


def check(
    queries: Floats, items: Floats, targets: Ints, lists: list[list[int]], values_UN: Scores, k: int
) -> None:
    """Every ranking and every search agrees with the dense scores, bit by bit."""
    scores_UN, correction = canonical(queries, items, values_UN), SparseScores.from_dense(values_UN)
    nothing: list[set[int]] = [set() for _ in lists]
    for seen, gone in [(make_seen(lists), [*map(set, lists)]), (None, nothing)]:
        kept, filtered = brute.ranks(scores_UN, targets, gone)
        found = [rank_with(name, queries, items, targets, seen, correction) for name in EXACT]
        found.append(rank(queries, items, targets, seen, correction=correction, block=(3, 37)))
        for ranks in found:
            np.testing.assert_array_equal(ranks.kept, kept)
            np.testing.assert_array_equal(ranks.filtered, filtered)
        expected_items, expected_scores = brute.top(scores_UN, k, gone)
        for name in EXACT:
            found_scores, found_items = make_index(name, items).search(queries, k, seen, correction)
            assert found_items.tolist() == expected_items
            np.testing.assert_array_equal(found_scores, expected_scores)


def test_ranks_by_hand() -> None:
    # The inner products are 9, 1, 5, 7, 5. Item 2 is the target.
    items = np.array([9, 1, 5, 7, 5], np.float32)[:, None]
    correction = SparseScores(
        items=np.array([0, 1, 2, 1, 4]),
        offsets=np.array([0, 2, 3, 3, 5]),
        values=np.array([-8.0, 4.0, 2.5, 4.0, -0.5]),
    )
    ranks = rank(
        np.ones((4, 1), np.float32),
        items,
        np.array([2, 2, 2, 2]),
        make_seen([[3], [0], [], [1]]),
        correction=correction,
    )
    # User 0: scores 1, 5, 5, 7, 5. User 1: 9, 1, 7.5, 7, 5. User 2: as without a correction.
    # User 3: 9, 5, 5, 7, 4.5.
    assert ranks.kept.tolist() == [4, 2, 4, 4]
    assert ranks.filtered.tolist() == [3, 1, 4, 3]


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kinds=st.tuples(st.sampled_from(brute.KINDS), st.sampled_from(brute.KINDS)),
    users=st.integers(1, 8),
    count=st.integers(1, 200),
    dim=st.integers(1, 24),
    k=st.integers(1, 60),
)
def test_a_correction_is_applied_exactly(
    seed: int, kinds: tuple[str, str], users: int, count: int, dim: int, k: int
) -> None:
    rng = np.random.default_rng(seed)
    queries, items = (
        brute.vectors(kinds[0], rng, users, dim),
        brute.vectors(kinds[1], rng, count, dim),
    )
    targets, lists = rng.integers(0, count, users), brute.seen_lists(rng, users, count, 40)
    plain_UN = canonical(queries, items, np.zeros((users, count)))
    check(queries, items, targets, lists, corrections(rng, plain_UN, targets, lists), k)


@pytest.mark.parametrize("kind", ["gauss", "equal", "near", "duplicates", "integers"])
def test_a_catalogue_longer_than_one_tile_and_one_list(kind: str) -> None:
    rng = np.random.default_rng(21)
    users, count = 12, 5000
    queries, items = brute.vectors("gauss", rng, users, 4), brute.vectors(kind, rng, count, 4)
    targets, lists = rng.integers(0, count, users), brute.seen_lists(rng, users, count, 60)
    plain_UN = canonical(queries, items, np.zeros((users, count)))
    values_UN = corrections(rng, plain_UN, targets, lists)
    check(queries, items, targets, lists, values_UN, 20)


def test_equal_vectors_tie_only_with_equal_values() -> None:
    # So many equal items that their vectors are compared instead of their scores.
    items, queries = np.ones((300, 2), np.float32), np.ones((40, 2), np.float32)
    targets, values_UN = np.full(40, 7), np.zeros((40, 300))
    values_UN[:, 100:200] = 1e-9
    values_UN[:20, 7] = 1e-9
    values_UN[0, 7] = 1e-12
    ranks = rank(queries, items, targets, correction=SparseScores.from_dense(values_UN))
    assert ranks.kept.tolist() == [101] + [101] * 19 + [300] * 20
    check(queries, items, targets, [[]] * 40, values_UN, 5)


@pytest.mark.parametrize("name", EXACT)
def test_an_empty_correction_changes_nothing(name: str) -> None:
    rng = np.random.default_rng(2)
    queries, items = brute.vectors("gauss", rng, 30, 8), brute.vectors("near", rng, 500, 8)
    targets, seen = rng.integers(0, 500, 30), make_seen(brute.seen_lists(rng, 30, 500, 40))
    none = SparseScores.empty(30)
    for left, right in [
        (rank_with(name, queries, items, targets, seen), None),
        (rank(queries, items, targets, seen), none),
    ]:
        ranks = rank_with(name, queries, items, targets, seen, right)
        np.testing.assert_array_equal(ranks.kept, left.kept)
        np.testing.assert_array_equal(ranks.filtered, left.filtered)
    index = make_index(name, items)
    for plain, corrected in zip(
        index.search(queries, 9, seen), index.search(queries, 9, seen, none), strict=True
    ):
        np.testing.assert_array_equal(plain, corrected)
    assert rank_with(name, queries[:0], items, targets[:0], None, none.rows(0, 0)).kept.size == 0


def test_a_large_value_does_not_blur_the_other_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    # A margin that grew with the largest value of the row would leave every pair to float64.
    rng = np.random.default_rng(4)
    queries, items = brute.vectors("gauss", rng, 16, 32), brute.vectors("gauss", rng, 3000, 32)
    values_UN = np.zeros((16, 3000))
    values_UN[:, ::50] = -1e30
    settled = 0

    def counting(left: Any, right: Any, left_P: torch.Tensor, right_P: torch.Tensor) -> Any:
        nonlocal settled
        settled += len(left_P)
        return exact_scores(left, right, left_P, right_P)

    monkeypatch.setattr("retrieval.exact_scores.exact_scores", counting)
    targets = rng.integers(0, 3000, 16) // 50 * 50 + 1
    rank(queries, items, targets, correction=SparseScores.from_dense(values_UN))
    assert settled < 100


class LargestTensor(TorchDispatchMode):
    """Note the number of elements of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A dispatch mode sees the operations of its own thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", EXACT)
def test_memory_does_not_grow_with_users_times_items(name: str) -> None:
    rng = np.random.default_rng(5)
    users, count = 2000, 20_000
    queries, items = brute.vectors("gauss", rng, users, 4), brute.vectors("gauss", rng, count, 4)
    chosen = np.sort(rng.integers(0, count // 20, (users, 20)) + np.arange(20) * (count // 20), 1)
    correction = SparseScores(
        items=chosen.ravel(),
        offsets=np.arange(users + 1) * 20,
        values=rng.standard_normal(users * 20),
    )
    with LargestTensor() as largest:
        rank_with(name, queries, items, rng.integers(0, count, users), None, correction)
        make_index(name, items).search(queries, 10, None, correction)
    assert largest.elements <= 512 * 8192 < users * count // 9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", brute.KINDS)
def test_cuda_agrees_with_the_cpu(kind: str) -> None:
    rng = np.random.default_rng(3)
    queries, items = brute.vectors("gauss", rng, 20, 24), brute.vectors(kind, rng, 1500, 24)
    targets, lists = rng.integers(0, 1500, 20), brute.seen_lists(rng, 20, 1500, 40)
    plain_UN = canonical(queries, items, np.zeros((20, 1500)))
    correction = SparseScores.from_dense(corrections(rng, plain_UN, targets, lists))
    on_device = torch.from_numpy(queries).cuda(), torch.from_numpy(items).cuda()

    expected = rank(queries, items, targets, make_seen(lists), correction=correction)
    ranks = rank(*on_device, targets, make_seen(lists), correction=correction)
    np.testing.assert_array_equal(ranks.kept, expected.kept)
    np.testing.assert_array_equal(ranks.filtered, expected.filtered)
    for left, right in zip(
        make_index("torch", on_device[1]).search(on_device[0], 20, make_seen(lists), correction),
        make_index("torch", items).search(queries, 20, make_seen(lists), correction),
        strict=True,
    ):
        np.testing.assert_array_equal(left, right)


def test_rows_and_entries() -> None:
    dense = np.array([[0, 1, 0, 2], [0, 0, 0, 0], [3, 0, -1, 0]], np.float32)
    scores = SparseScores.from_dense(dense)
    assert (len(scores), scores.items.tolist(), scores.offsets.tolist()) == (
        3,
        [1, 3, 0, 2],
        [0, 2, 2, 4],
    )
    last = scores.rows(1, 3)
    assert (last.items.tolist(), last.offsets.tolist()) == ([0, 2], [0, 0, 2])
    assert last.values.tolist() == [3, -1]
    taken = scores.take(np.array([2, 1, 0]))
    assert (taken.values.tolist(), taken.offsets.tolist()) == ([3, -1, 1, 2], [0, 2, 2, 4])
    row, item, value = scores.entries(1, 3)
    assert list(zip(row.tolist(), item.tolist(), value.tolist(), strict=True)) == [
        (1, 0, 3),
        (1, 2, -1),
    ]
    assert scores.values_at(0, np.array([3, 3, 1])).tolist() == [2, 0, 0]
    assert scores.values_at(2, np.array([2])).tolist() == [-1]
    assert len(SparseScores.empty(4)) == 4
    assert len(SparseScores.from_dense(np.zeros((2, 3)))) == 2


@pytest.mark.parametrize(
    ("items", "offsets", "values", "message"),
    [
        ([1, 1], [0, 2], [0.0, 1.0], "row 0: item 1 follows 1"),
        ([0, 2, 1], [0, 0, 1, 3], [0.0, 1.0, 2.0], "row 2: item 1 follows 2"),
        ([0], [0, 1], [np.nan], "NaN"),
        ([0], [0, 1], [-np.inf], "infinity"),
        ([0], [0, 1], [1.0, 2.0], r"1 items but values of shape \(2,\)"),
        ([0], [0, 2], [1.0], "run from 0 to 1"),
        ([0], [0, 1], np.ones(1, np.float32), "float64"),
    ],
)
def test_malformed_rows_are_refused(
    items: list[int], offsets: list[int], values: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SparseScores(items=np.array(items), offsets=np.array(offsets), values=np.asarray(values))


@pytest.mark.parametrize("name", EXACT)
def test_a_correction_that_does_not_fit_is_refused(name: str) -> None:
    outside = SparseScores.from_dense(np.array([[0, 0, 1.0], [0, 0, 0]]))
    huge = SparseScores.from_dense(np.array([[0, 1e39], [0, 0]]))
    for correction, message in [
        (SparseScores.empty(3), "correction covers 3 users but there are 2"),
        (outside, r"correction holds items 2\.\.2, outside 0\.\.1"),
        (huge, "more than float32 holds"),
    ]:
        with pytest.raises(ValueError, match=message):
            rank_with(name, E2, E2, np.array([0, 1]), None, correction)
        with pytest.raises(ValueError, match=message):
            make_index(name, E2).search(E2, 1, None, correction)
