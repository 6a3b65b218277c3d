from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.index_ranking import rank_with
from retrieval.indexes import INDEXES, FaissIndex, make_index
from retrieval.ranking import Ranks, rank
from retrieval.seen_items import SeenItems
from tests.retrieval import brute
from tests.retrieval.brute import Floats, make_seen


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


@pytest.mark.parametrize("name", list(INDEXES))
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


@pytest.mark.parametrize("name", list(INDEXES))
def test_search_when_nearly_everything_is_seen(name: str) -> None:
    rng = np.random.default_rng(4)
    queries, items = brute.vectors("gauss", rng, 4, 6), brute.vectors("duplicates", rng, 2500, 6)
    everything = list(range(2500))
    lists = [everything, everything[3:], [], everything[:2400]]
    check_search(name, queries, items, 5, lists)


@pytest.mark.parametrize("name", list(INDEXES))
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
        for name in INDEXES:
            found = rank_with(name, queries, items, targets, exclude)
            np.testing.assert_array_equal(found.kept, counted.kept)
            np.testing.assert_array_equal(found.filtered, counted.filtered)
            lists.append(make_index(name, items).search(queries, k, exclude))
        for scores, ids in lists[1:]:
            np.testing.assert_array_equal(scores, lists[0][0])
            np.testing.assert_array_equal(ids, lists[0][1])


def test_faiss_reads_ranks_off_its_list_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(9)
    items = brute.vectors("gauss", rng, 500, 32)
    targets = rng.integers(0, 500, 20)
    queries = items[targets].copy()  # the target leads its own list ...
    queries[:3] *= -1  # ... and ends that of three users
    seen = make_seen(brute.seen_lists(rng, 20, 500, 30))
    expected = rank(queries, items, targets, seen)
    counted: list[int] = []

    def watched(left: Floats, *rest: Any, **options: Any) -> Ranks:
        counted.append(len(left))
        return rank(left, *rest, **options)

    monkeypatch.setattr("retrieval.index_ranking.rank", watched)
    found = rank_with("faiss", queries, items, targets, seen)
    assert counted == [3]
    np.testing.assert_array_equal(found.kept, expected.kept)
    np.testing.assert_array_equal(found.filtered, expected.filtered)
    rank_with("faiss", -items[:20], items[:40], np.arange(20))
    assert counted == [3], "a list of the whole catalogue leaves nobody over"


def test_faiss_is_not_asked_for_very_long_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    items = brute.vectors("gauss", np.random.default_rng(8), 2200, 4)
    lengths: list[int] = []
    fetch = FaissIndex.fetch

    def watched(
        index: FaissIndex, query_BD: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lengths.append(length)
        return fetch(index, query_BD, length)

    monkeypatch.setattr(FaissIndex, "fetch", watched)
    seen = make_seen([list(range(100, 2200))])
    found = rank_with("faiss", items[:1], items, np.zeros(1, np.int64), seen)
    assert found.filtered[0] == rank(items[:1], items, np.zeros(1, np.int64), seen).filtered[0]
    assert make_index("faiss", items).search(items[:1], 3, seen)[1].max() < 100
    assert lengths == [2048]


@pytest.mark.parametrize("name", list(INDEXES))
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
        with pytest.raises(ValueError, match="unknown index 'annoy'; known: faiss, torch"):
            call()


@pytest.mark.parametrize("name", list(INDEXES))
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
