import numpy as np
import pytest

from retrieval.ranking import Ranks
from tests.trainer import worlds
from trainer.evaluation.encode import histories_of, targets_of
from trainer.runs.evaluation_rows import metric_rows

WORLD = worlds.dataset([[0, 1, 2, 3], [1, 1], [4, 1, 0], [1, 2, 5, 0]], 6)


@pytest.mark.parametrize(
    ("split", "targets", "seen"),
    [
        ("validation", [2, 1, 5], [[0, 1], [4], [1, 2]]),
        ("test", [3, 0, 0], [[0, 1, 2], [4, 1], [1, 2, 5]]),
    ],
)
def test_all_that_came_before_the_target_is_seen(
    split: str, targets: list[int], seen: list[list[int]]
) -> None:
    evaluated = WORLD.eval_split(split)
    assert evaluated.users.tolist() == [0, 2, 3]  # the second user has too few to be evaluated
    assert targets_of(WORLD, evaluated).tolist() == targets
    histories = histories_of(WORLD, evaluated)
    rows = [
        histories.items[a:b].tolist()
        for a, b in zip(histories.offsets, histories.offsets[1:], strict=False)
    ]
    assert rows == seen


def test_popularity_counts_training_interactions_only() -> None:
    # train: 0 1 | 1 1 | 4 | 1 2 -> counts 1, 4, 1, 0, 1, 0
    assert WORLD.train_counts.tolist() == [1, 4, 1, 0, 1, 0]
    ranks = worlds.popularity_ranks(WORLD)
    # target 3 (count 0) ties with 5; targets 0 (count 1) tie with 2 and 4, behind 1
    assert ranks.kept.tolist() == [6, 4, 4]
    assert ranks.filtered.tolist() == [3, 2, 2]


def test_rows_of_the_metrics_table_say_what_they_are() -> None:
    ranks = Ranks(kept=np.array([1, 20, 3]), filtered=np.array([1, 10, 2]))
    subset = np.array([True, True, False])
    rows = metric_rows("test", "cold", "model", ranks, subset)
    values = {(row["seen"], row["metric"]): row for row in rows}
    assert values["filtered", "HR@10"]["value"] == 1
    assert values["kept", "HR@10"]["value"] == 1 / 2
    assert values["filtered", "MRR"]["value"] == pytest.approx((1 + 1 / 10) / 2)
    assert values["kept", "MRR"]["value"] == pytest.approx((1 + 1 / 20) / 2)
    assert {row["users"] for row in rows} == {2}
    assert {(row["split"], row["targets"], row["ranker"], row["phase"]) for row in rows} == {
        ("test", "cold", "model", "eval")
    }
    # two users: a resample is a pair, so the outer 2.5% are the worst and the best pair
    assert values["kept", "HR@10"]["low"] == 0
    assert values["kept", "HR@10"]["high"] == 1
