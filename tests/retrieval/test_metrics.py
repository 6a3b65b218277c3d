from fractions import Fraction

import numpy as np
import pytest

from retrieval.metrics import hit_rate, ndcg, per_user, reciprocal_rank, single_best

RANKS = np.array([1, 2, 3, 5, 6, 7, 10, 11, 1000])


def test_metrics_by_hand() -> None:
    assert hit_rate(RANKS, 5).tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert hit_rate(RANKS, 10).mean() == float(Fraction(7, 9))
    assert reciprocal_rank(RANKS).tolist() == [float(Fraction(1, r)) for r in RANKS.tolist()]
    # log2 of 2, 4 and 8 is 1, 2 and 3.
    assert ndcg(np.array([1, 3, 7, 8]), 7).tolist() == [1, 1 / 2, 1 / 3, 0]
    np.testing.assert_allclose(ndcg(RANKS[1:2], 5), [1 / np.log2(3)])
    assert ndcg(RANKS, 1).tolist() == hit_rate(RANKS, 1).tolist()


def test_the_table_has_every_metric_of_every_user() -> None:
    table = per_user(RANKS)
    names = [f"{metric}@{k}" for metric in ("HR", "NDCG") for k in (5, 10, 20, 50)]
    assert list(table) == [*names, "MRR"]
    assert all(
        values.shape == RANKS.shape and values.dtype == np.float64 for values in table.values()
    )
    assert table["NDCG@10"].tolist() == ndcg(RANKS, 10).tolist()
    assert list(per_user(RANKS, cutoffs=[1])) == ["HR@1", "NDCG@1", "MRR"]
    assert per_user(RANKS[:0])["HR@5"].shape == (0,)


@pytest.mark.parametrize(
    ("ranks", "k", "message"),
    [
        (np.array([1, 0]), 5, "rank is 0: ranks start at 1"),
        (np.array([1.5]), 5, "expected \\(U,\\) integers"),
        (np.array([[1]]), 5, "expected \\(U,\\) integers"),
        (np.array([1]), 0, "cut-off 0"),
    ],
)
def test_senseless_ranks_are_refused(ranks: np.ndarray, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        per_user(ranks, cutoffs=[k])


@pytest.mark.parametrize(
    ("values", "best"),
    [([0.1, 0.3, 0.2], 1), ([0.3, 0.3], None), ([0.2, 0.3, 0.3], None), ([0.5], 0), ([], None),
     ([0.12341, 0.12344], None), ([0.12344, 0.12346], 1)],
)  # fmt: skip
def test_equal_values_have_no_single_best(values: list[float], best: int | None) -> None:
    assert single_best(values) == best
