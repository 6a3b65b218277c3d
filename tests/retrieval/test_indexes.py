import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.default_index import DefaultIndex
from retrieval.exact_scores import TargetScores
from retrieval.flat_index import FaissIndex
from retrieval.index_ranking import rank_with
from retrieval.ranking import Ranks, count_ranks, rank
from retrieval.registry import make_index
from retrieval.seen_items import SeenItems
from tests.retrieval import brute
from tests.retrieval.brute import EXACT, Floats, make_seen


def check_search(
    name: str, queries: Floats, items: Floats, k: int, lists: list[list[int]] | None
) -> None:
    seen = None if lists is None else make_seen(lists)
    scores, found = make_index(name, items).search(queries, k, seen)
    gone = [set(one) for one in lists] if lists else [set[int]() for _ in queries]
    assert found.tolist() == brute.top(brute.all_scores(queries, items), k, gone)[0]
    assert scores.dtype == np.float32
    assert found.dtype == np.int64
    for query, row, line in zip(queries, found.tolist(), scores.tolist(), strict=True):
        exact = [brute.dot(query, items[j]) if j >= 0 else -np.inf for j in row]
        np.testing.assert_allclose(line, exact, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("kind", brute.KINDS)
def test_search_is_a_sort_cut_short(name: str, kind: str) -> None:
    rng = np.random.default_rng(1)
    for users, count, dim, k in [(3, 120, 9, 5), (2, 40, 3, 40), (2, 7, 2, 20), (1, 1, 1, 1)]:
        queries, items = (
            brute.vectors("gauss", rng, users, dim),
            brute.vectors(kind, rng, count, dim),
        )
        check_search(name, queries, items, k, None)
        check_search(name, queries, items, k, brute.seen_lists(rng, users, count, count))


@pytest.mark.parametrize("name", EXACT)
def test_search_when_nearly_everything_is_seen(name: str) -> None:
    rng = np.random.default_rng(4)
    queries, items = brute.vectors("gauss", rng, 4, 6), brute.vectors("duplicates", rng, 2500, 6)
    everything = list(range(2500))
    lists = [everything, everything[3:], [], everything[:2400]]
    check_search(name, queries, items, 5, lists)


@pytest.mark.parametrize("name", EXACT)
def test_equals_beyond_the_list_are_not_missed(name: str) -> None:
    # 300 items tie for the first place; FAISS and top-k may return any of them.
    queries, items = np.ones((2, 2), np.float32), np.ones((400, 2), np.float32)
    items[::4] = 0
    scores, found = make_index(name, items).search(queries, 4, make_seen([[], [1, 3]]))
    assert found.tolist() == [[1, 2, 3, 5], [2, 5, 6, 7]]
    assert scores.tolist() == [[2.0] * 4] * 2


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kinds=st.tuples(st.sampled_from(brute.KINDS), st.sampled_from(brute.KINDS)),
    users=st.integers(0, 8),
    count=st.integers(1, 400),
    dim=st.integers(1, 40),
    k=st.integers(1, 60),
)
def test_every_index_gives_the_same_ranks_and_lists(
    seed: int, kinds: tuple[str, str], users: int, count: int, dim: int, k: int
) -> None:
    rng = np.random.default_rng(seed)
    queries = brute.vectors(kinds[0], rng, users, dim) if users else np.zeros((0, dim), np.float32)
    items = brute.vectors(kinds[1], rng, count, dim)
    targets, seen = (
        rng.integers(0, count, users),
        make_seen(brute.seen_lists(rng, users, count, 80)),
    )
    for exclude in (seen, None):
        counted = rank(queries, items, targets, exclude)
        lists = []
        for name in EXACT:
            found = rank_with(name, queries, items, targets, exclude)
            np.testing.assert_array_equal(found.kept, counted.kept)
            np.testing.assert_array_equal(found.filtered, counted.filtered)
            lists.append(make_index(name, items).search(queries, k, exclude))
        for scores, ids in lists[1:]:
            np.testing.assert_array_equal(scores, lists[0][0])
            np.testing.assert_array_equal(ids, lists[0][1])


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the number of users of each call that counts ranks."""
    users: list[int] = []

    def watched(target_scores: TargetScores, *rest: Any, **options: Any) -> Ranks:
        users.append(len(target_scores.target_U))
        return count_ranks(target_scores, *rest, **options)

    monkeypatch.setattr("retrieval.index_ranking.count_ranks", watched)
    return users


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return the users and the length of each flat search."""
    searches: list[tuple[int, int]] = []
    fetch = FaissIndex.fetch

    def watched(
        index: FaissIndex, query_BD: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        searches.append((len(query_BD), length))
        return fetch(index, query_BD, length)

    monkeypatch.setattr(FaissIndex, "fetch", watched)
    return searches


def assert_equal_ranks(actual: Ranks, expected: Ranks) -> None:
    np.testing.assert_array_equal(actual.kept, expected.kept)
    np.testing.assert_array_equal(actual.filtered, expected.filtered)


def test_flat_search_decides_ranks_near_the_top(counted: list[int]) -> None:
    rng = np.random.default_rng(9)
    items = brute.vectors("gauss", rng, 500, 32)
    targets = rng.integers(0, 500, 20)
    queries = items[targets].copy()  # the target leads its own list ...
    queries[:3] *= -1  # ... and ends that of three users
    seen = make_seen(brute.seen_lists(rng, 20, 500, 30))
    expected = rank(queries, items, targets, seen)
    assert_equal_ranks(rank_with("faiss:flat", queries, items, targets, seen), expected)
    assert counted == [3]
    rank_with("faiss:flat", -items[:20], items[:40], np.arange(20))
    assert counted == [3], "a list of the whole catalogue leaves nobody over"


def test_a_user_with_many_seen_items_is_treated_alone(
    counted: list[int], fetched: list[tuple[int, int]]
) -> None:
    rng = np.random.default_rng(8)
    items = brute.vectors("gauss", rng, 6000, 4)
    items /= np.linalg.norm(items, axis=1, keepdims=True)
    queries, targets = items[:8].copy(), np.arange(8)
    lists = [[9, 3], list(range(100, 5000)), [], [7], list(range(5, 700)), [1], [2], [0]]
    seen = make_seen(lists)
    expected = rank(queries, items, targets, seen)
    assert_equal_ranks(rank_with("faiss:flat", queries, items, targets, seen), expected)
    assert fetched == [(7, 745)]
    assert counted == [1]
    fetched.clear()
    lists_of_flat = make_index("faiss:flat", items).search(queries, 3, seen)
    assert sorted(fetched) == [(1, 714), (6, 21)], "the user with 4,900 seen items is not fetched"
    for one, other in zip(
        lists_of_flat, make_index("torch", items).search(queries, 3, seen), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Make the default measure at any size; the ratios of the measurements are those given."""
    ratios: dict[str, float] = {}
    for module in ("default_index", "index_ranking"):
        monkeypatch.setattr(f"retrieval.{module}.WORTH_MEASURING", 0)
        monkeypatch.setattr(
            f"retrieval.{module}.measured_ratio", lambda kind, *rest, **options: ratios[kind]
        )
    return ratios


@pytest.mark.parametrize(
    ("ratio", "near", "way", "users"),
    [
        (
            1.3,
            1.0,
            "ranks by counting (flat search takes 1.30 of its time",
            [90],
        ),
        (0.5, 0.0, "ranks by counting (flat search would decide about", [90]),
        (0.5, 1.0, "ranks by flat search (flat search takes 0.50 of the time of counting", []),
    ],
)
def test_the_default_ranks_in_the_faster_way(
    measured: dict[str, float],
    counted: list[int],
    ratio: float,
    near: float,
    way: str,
    users: list[int],
) -> None:
    rng = np.random.default_rng(3)
    items = brute.vectors("gauss", rng, 700, 16)
    targets = rng.integers(0, 700, 90)
    queries = near * items[targets] + (1 - near) * brute.vectors("gauss", rng, 90, 16)
    seen = make_seen(brute.seen_lists(rng, 90, 700, 20))
    measured["ranks"] = ratio
    expected = rank(queries, items, targets, seen)
    choices: list[str] = []
    ranks = rank_with("faiss", queries, items, targets, seen, on_choice=choices.append)
    assert_equal_ranks(ranks, expected)
    assert len(choices) == 1
    assert way in choices[0]
    assert counted == users


@pytest.mark.parametrize(("ratio", "searches"), [(0.4, 1), (1.2, 0)])
def test_the_default_lists_in_the_faster_way(
    measured: dict[str, float], fetched: list[tuple[int, int]], ratio: float, searches: int
) -> None:
    rng = np.random.default_rng(4)
    queries, items = brute.vectors("gauss", rng, 30, 8), brute.vectors("bf16", rng, 900, 8)
    measured["lists"] = ratio
    index = DefaultIndex(items)
    scores, indices = index.search(queries, 12)
    assert len(fetched) == searches
    assert f"{ratio:.2f}" in index.choice
    for one, other in zip(
        (scores, indices), make_index("torch", items).search(queries, 12), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_measurement_compares_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("default_index", "index_ranking"):
        monkeypatch.setattr(f"retrieval.{module}.WORTH_MEASURING", 0)
    monkeypatch.setattr("retrieval.default_index._measured", {})
    rng = np.random.default_rng(6)
    queries, items = brute.vectors("gauss", rng, 80, 8), brute.vectors("gauss", rng, 400, 8)
    targets = rng.integers(0, 400, 80)
    choices: list[str] = []
    queries = items[targets]
    ranks = rank_with("faiss", queries, items, targets, on_choice=choices.append)
    assert_equal_ranks(ranks, rank(queries, items, targets))
    index = DefaultIndex(items)
    index.search(queries, 5)
    assert re.search(r"\d\.\d\d of", choices[0])
    assert re.search(r"\d\.\d\d of", index.choice)


def test_a_small_problem_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrieval.default_index._measured", {})
    items = np.eye(20, dtype=np.float32)
    choices: list[str] = []
    rank_with("faiss", items, items, np.arange(20), on_choice=choices.append)
    index = DefaultIndex(items)
    index.search(items, 3)
    assert choices == ["ranks by counting (few scores)"]
    assert index.choice == "lists by torch (few scores)"
    index.search(items[:1], 3)
    assert index.choice == "lists by flat search (few queries)"


@pytest.mark.parametrize("name", EXACT)
def test_autocast_decides_no_list(name: str) -> None:
    rng = np.random.default_rng(6)
    queries, items = (torch.from_numpy(brute.vectors("gauss", rng, n, 32)) for n in (200, 3000))
    expected = make_index(name, items).search(queries, 10)
    with torch.autocast("cpu", torch.bfloat16):
        found = make_index(name, items.requires_grad_()).search(queries.requires_grad_(), 10)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])


def test_an_unknown_index_is_refused_by_name() -> None:
    one = np.ones((1, 1), np.float32)
    for call in (
        lambda: make_index("annoy", one),
        lambda: rank_with("annoy", one, one, np.zeros(1, np.int64)),
    ):
        with pytest.raises(ValueError, match=r"unknown index 'annoy'; known: faiss, .*torch"):
            call()


@pytest.mark.parametrize("name", EXACT)
def test_what_cannot_be_searched_is_refused(name: str) -> None:
    items = np.ones((3, 2), np.float32)
    with pytest.raises(ValueError, match="items are empty"):
        make_index(name, items[:0])
    index = make_index(name, items)
    bad: list[tuple[Floats, int, SeenItems | None, str]] = [
        (items[:, :1], 1, None, "queries have 1 dimensions but items have 2"),
        (items * np.float32("nan"), 1, None, "queries row 0 holds NaN"),
        (items, 0, None, "k is 0"),
        (items, 1, make_seen([[0]]), "exclude covers 1 users"),
        (items * np.float32(3e38), 1, None, "more than float32 holds"),
    ]
    for queries, k, seen, message in bad:
        with pytest.raises(ValueError, match=message):
            index.search(queries, k, seen)
