from typing import Any

import numpy as np
import pytest

from retrieval.approximate_indexes import ApproximateIndex, recall
from retrieval.index_options import PARAMETERS
from retrieval.index_ranking import rank_with
from retrieval.metrics import UNRANKED
from retrieval.ranking import rank
from retrieval.registry import make_index
from retrieval.sparse_scores import SparseScores
from tests.retrieval import brute
from tests.retrieval.brute import Floats, make_seen

COMPLETE = {
    "faiss:ivf": "faiss:ivf,nlist=5,nprobe=5",
    "faiss:ivfpq": "faiss:ivfpq,nlist=5,nprobe=5,nbits=4,k_factor=999",
    "faiss:hnsw": "faiss:hnsw,efSearch=999,efConstruction=400",
}
"""Parameters with which an index looks at every item of a small catalogue."""


def clusters(rng: np.random.Generator, rows: int, dim: int = 16) -> Floats:
    """Return unit vectors of 20 groups."""
    centres = rng.standard_normal((20, dim))
    vectors = centres[rng.integers(0, 20, rows)] + 0.5 * rng.standard_normal((rows, dim))
    unit: Floats = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return unit


class DictStore:
    """Indexes in memory, with the number of each call."""

    def __init__(self) -> None:
        self.indexes: dict[tuple[str, str], Any] = {}
        self.loaded = 0

    def load(self, name: str, fingerprint: str) -> Any | None:
        index = self.indexes.get((name, fingerprint))
        self.loaded += index is not None
        return index

    def save(self, name: str, fingerprint: str, index: Any) -> None:
        self.indexes[name, fingerprint] = index


@pytest.mark.parametrize("kind", list(PARAMETERS))
def test_an_index_that_looks_at_every_item_is_exact(kind: str) -> None:
    rng = np.random.default_rng(1)
    items, queries = clusters(rng, 300), clusters(rng, 40)
    lists = brute.seen_lists(rng, 40, 300, 60)
    values = rng.standard_normal((40, 300)) * (rng.random((40, 300)) < 0.05)
    correction = SparseScores.from_dense(values)
    index = make_index(COMPLETE[kind], items)
    assert not index.is_exact
    for exclude in (None, make_seen(lists)):
        for added in (None, correction):
            expected = make_index("torch", items).search(queries, 10, exclude, added)
            actual = index.search(queries, 10, exclude, added)
            np.testing.assert_array_equal(actual[1], expected[1])
            np.testing.assert_array_equal(actual[0], expected[0])


@pytest.mark.parametrize("kind", list(PARAMETERS))
def test_lists_hold_exact_scores_and_no_seen_item(kind: str) -> None:
    rng = np.random.default_rng(2)
    items, queries = clusters(rng, 400), clusters(rng, 30)
    lists = brute.seen_lists(rng, 30, 400, 100)
    lists[3] = list(range(400))
    scores, found = make_index(kind, items).search(queries, 10, make_seen(lists))
    assert (found[3] == -1).all()
    for user, (row, line) in enumerate(zip(found.tolist(), scores.tolist(), strict=True)):
        listed = [item for item in row if item >= 0]
        assert not set(listed) & set(lists[user])
        assert len(set(listed)) == len(listed)
        exact = np.array([brute.dot(queries[user], items[item]) for item in listed])
        np.testing.assert_allclose(line[: len(listed)], exact, rtol=1e-6)
        assert (np.diff(line[: len(listed)]) <= 0).all()


@pytest.mark.parametrize("kind", list(PARAMETERS))
@pytest.mark.parametrize("count", [2, 3, 40])
def test_small_catalogues_are_searched(kind: str, count: int) -> None:
    items = clusters(np.random.default_rng(3), count)
    items_of_lists = make_index(kind, items).search(items, 50)[1]
    assert items_of_lists.shape == (count, 50)
    assert items_of_lists.max() < count
    assert (items_of_lists[:, 0] >= 0).all()


@pytest.mark.parametrize("kind", list(PARAMETERS))
def test_recall_is_the_share_of_the_best_items(kind: str) -> None:
    rng = np.random.default_rng(4)
    items, queries = clusters(rng, 3000), clusters(rng, 50)
    index, exact = make_index(kind, items), make_index("torch", items)
    best, indices = exact.search(queries, 10)[1], index.search(queries, 10)[1]
    shares = [len(set(a) & set(b)) / 10 for a, b in zip(best, indices, strict=True)]
    assert recall(index, exact, queries, 10) == pytest.approx(np.mean(shares))
    assert recall(exact, exact, queries, 10) == 1
    assert recall(exact, exact, queries[:1], 5000) == 1


def test_fewer_probes_find_fewer_items() -> None:
    rng = np.random.default_rng(5)
    items, queries = brute.vectors("gauss", rng, 4000, 16), brute.vectors("gauss", rng, 50, 16)
    exact = make_index("torch", items)
    shares = [
        recall(make_index(f"faiss:ivf,nlist=64,nprobe={probes}", items), exact, queries, 10)
        for probes in (1, 8, 64)
    ]
    assert shares[0] < shares[1] < shares[2] == 1


@pytest.mark.parametrize("kind", list(PARAMETERS))
def test_a_trained_index_is_used_again_for_the_same_vectors(kind: str) -> None:
    items, store = clusters(np.random.default_rng(6), 300), DictStore()
    search = "efSearch" if kind == "faiss:hnsw" else "nprobe"
    build = "M=8" if kind == "faiss:hnsw" else "nlist=3"
    first = make_index(kind, items, store)
    again = make_index(f"{kind},{search}=2", items, store)
    assert isinstance(first, ApproximateIndex)
    assert isinstance(again, ApproximateIndex)
    assert (first.is_reused, again.is_reused, store.loaded) == (False, True, 1)
    assert again.values[search] == 2
    other = items.copy()
    other[7, 3] = np.nextafter(other[7, 3], np.float32(2))
    for name, vectors in ((kind, other), (kind, items[:-1]), (f"{kind},{build}", items)):
        make_index(name, vectors, store)
    assert store.loaded == 1
    assert len(store.indexes) == 4


@pytest.mark.parametrize("kind", list(PARAMETERS))
def test_ranks_are_places_in_lists(kind: str) -> None:
    rng = np.random.default_rng(7)
    items = clusters(rng, 300)
    targets = rng.integers(0, 300, 40)
    queries = (items[targets] + 0.1 * rng.standard_normal((40, 16))).astype(np.float32)
    queries[:5] *= -1  # these targets are not among the first 50
    seen = make_seen(brute.seen_lists(rng, 40, 300, 60))
    expected = rank(queries, items, targets, seen)
    ranks = rank_with(COMPLETE[kind], queries, items, targets, seen)
    for actual, exact in ((ranks.kept, expected.kept), (ranks.filtered, expected.filtered)):
        is_far = (exact > 50) & (exact != UNRANKED)
        assert is_far.any()
        np.testing.assert_array_equal(actual, np.where(is_far, 300, exact))


def test_ties_in_a_list_count_against_the_target() -> None:
    items = np.ones((20, 2), np.float32)
    items[10:] *= 0.5
    ranks = rank_with("faiss:ivf,nlist=1", items[:2], items, np.array([3, 12]))
    assert ranks.kept.tolist() == [10, 20]


def test_a_user_with_many_seen_items_is_searched_exactly() -> None:
    rng = np.random.default_rng(8)
    items, queries = clusters(rng, 5000), clusters(rng, 6)
    lists: list[list[int]] = [[], list(range(4000)), [1], [2], [3], []]
    index = make_index("faiss:ivf,nprobe=1", items)
    expected = make_index("torch", items).search(queries[1:2], 10, make_seen([lists[1]]))
    actual = index.search(queries, 10, make_seen(lists))
    np.testing.assert_array_equal(actual[1][1], expected[1][0])
