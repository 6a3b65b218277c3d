"""Metrics of recommended items: by hand, and equal to their definitions."""

import numpy as np
import pytest

from retrieval.indexes import TorchIndex
from retrieval.list_metrics import count_recommended, list_metrics
from retrieval.seen_items import SeenItems
from retrieval.sparse_ranking import top_sparse
from retrieval.sparse_scores import SparseScores


def test_values_by_hand() -> None:
    lists = np.array([[0, 1, 3], [0, 2, -1], [0, 1, -1]])
    popularity = np.array([8, 4, 2, 0, 2])  # of 16 interactions: 1, 2, 3, 4 (as one) and 3 bits
    is_cold = np.array([False, False, True, True, True])
    counts = count_recommended(lists, 5)
    assert counts.tolist() == [3, 2, 1, 1, 0]
    assert list_metrics(counts, popularity, is_cold) == {
        "coverage@10": 4 / 5,
        "novelty@10": (3 * 1 + 2 * 2 + 3 + 4) / 7,
        "cold_share@10": 2 / 7,
    }


def test_without_recommended_items_every_metric_is_zero() -> None:
    counts = count_recommended(np.full((2, 3), -1), 4)
    values = list_metrics(counts, np.zeros(4, np.int64), np.ones(4, bool))
    assert set(values.values()) == {0.0}


@pytest.mark.parametrize("seed", range(20))
def test_metrics_equal_their_definitions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_items = int(rng.integers(1, 40))
    lists = np.stack([rng.permutation(n_items)[: min(10, n_items)] for _ in range(7)])
    lists[rng.random(lists.shape) < 0.2] = -1
    popularity = rng.integers(0, 6, n_items)
    is_cold = popularity < 2
    shown = [int(item) for row in lists for item in row if item >= 0]
    total = max(sum(popularity.tolist()), 1)
    bits = [-np.log2(max(int(popularity[item]), 1) / total) for item in shown]
    values = list_metrics(count_recommended(lists, n_items), popularity, is_cold)
    assert values["coverage@10"] == len(set(shown)) / n_items
    assert values["novelty@10"] == pytest.approx(np.mean(bits), abs=1e-12)
    assert values["cold_share@10"] == pytest.approx(np.mean([is_cold[item] for item in shown]))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("block", [1, 3, 100])
def test_sparse_lists_equal_those_of_an_index(seed: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    users, items, k = 9, int(rng.integers(1, 30)), int(rng.integers(1, 12))
    dense = rng.integers(-2, 4, (users, items)) * (rng.random((users, items)) < 0.5)
    scores = SparseScores.from_dense(dense.astype(float))
    seen = [rng.permutation(items)[: rng.integers(0, items + 1)] for _ in range(users)]
    exclude = SeenItems(
        items=np.concatenate(seen).astype(np.int64),
        offsets=np.concatenate([[0], np.cumsum([len(row) for row in seen])]).astype(np.int64),
    )
    index = TorchIndex(np.zeros((items, 1), np.float32))
    queries = np.zeros((users, 1), np.float32)

    def score(rows: slice) -> SparseScores:
        return scores.rows(rows.start, rows.stop)

    for left_out in (None, exclude):
        expected = index.search(queries, k, left_out, scores)[1]
        assert (top_sparse(score, users, items, k, left_out, block=block) == expected).all()


def test_sparse_lists_refuse_a_length_of_zero() -> None:
    with pytest.raises(ValueError, match="k is 0"):
        top_sparse(lambda rows: SparseScores.empty(1), 1, 1, 0)
