"""Targets that the user already had: missed when seen items are filtered, everywhere."""

import numpy as np
import pytest

from features.atomic_files import read_table
from features.errors import UserError
from features.warehouse import Warehouse
from retrieval.ranking import Ranks
from tests.trainer import worlds
from trainer.analysis.compare import compare
from trainer.checkpoint import save_weights
from trainer.runs.evaluate import evaluate

RANDOM = np.random.default_rng(0).integers(0, 3, (10, 12)).tolist()
MIXED = [[0, 1, 2, 0, 4], [1, 2, 3, 4, 5], [2, 3, 4, 5, 3], [3, 4, 5, 0, 1]]


def evaluated(warehouse: Warehouse, sequences: list[list[int]], n_items: int, index: str) -> None:
    worlds.prepare(warehouse, sequences, n_items)
    for model in ("popularity", "sasrec", "transitions"):
        own = ("dim=8", "heads=2", "hidden=8", "length=5") if model == "sasrec" else ()
        run = worlds.begin(warehouse, model, settings=("device=cpu", *own), name=model)
        save_weights(run.weights, run.model, run.spec.identity())
        evaluate(warehouse, run, index=index)


@pytest.mark.parametrize("index", ["faiss", "torch"])
def test_no_model_scores_where_every_target_is_repeated(warehouse: Warehouse, index: str) -> None:
    evaluated(warehouse, RANDOM, 3, index)
    for model in ("popularity", "sasrec", "transitions"):
        folder = warehouse.runs_dir / model
        rows = [
            r for r in read_table(folder / "metrics.parquet").to_pylist() if r["low"] is not None
        ]
        assert {r["targets"] for r in rows if r["targets"] != "cold"} == {"all", "repeated"}
        assert {r["value"] for r in rows if r["seen"] == "filtered"} == {0.0}
        assert all(r["value"] > 0 for r in rows if r["seen"] == "kept" and r["metric"] == "MRR")
        predictions = read_table(folder / "predictions.parquet")
        assert predictions["rank_filtered"].null_count == len(predictions) == 20


def test_subsets_of_repeated_and_new_targets_by_hand(warehouse: Warehouse) -> None:
    evaluated(warehouse, MIXED, 6, "faiss")
    # Test targets: 4 new, 5 new, 3 repeated, 1 new. Validation targets: 0 repeated, the rest new.
    rows = read_table(warehouse.runs_dir / "sasrec" / "metrics.parquet").to_pylist()
    users = {(r["split"], r["targets"]): r["users"] for r in rows}
    assert [users["test", name] for name in ("all", "new", "repeated")] == [4, 3, 1]
    assert [users["validation", name] for name in ("all", "new", "repeated")] == [4, 3, 1]
    mrr = {
        (r["targets"], r["seen"]): r["value"]
        for r in rows
        if (r["split"], r["metric"], r["ranker"]) == ("test", "MRR", "sasrec")
    }
    assert ("repeated", "filtered") not in mrr
    assert mrr["all", "filtered"] == pytest.approx(mrr["new", "filtered"] * 3 / 4)
    pair = ["popularity", "sasrec"]
    for targets, count, seen in (
        ("all", 4, {"filtered", "kept"}),
        ("new", 3, {"filtered", "kept"}),
        ("repeated", 1, {"kept"}),
    ):  # fmt: skip
        comparison = compare(warehouse, pair, targets=targets)
        assert (comparison.users, comparison.repeated) == (count, 1 / 4)
        assert {line.seen for line in comparison.lines} == seen


def test_without_repeated_targets_there_are_no_such_subsets(warehouse: Warehouse) -> None:
    evaluated(warehouse, [[0, 1, 2, 3, 4], [1, 2, 3, 4, 5]], 6, "faiss")
    rows = read_table(warehouse.runs_dir / "popularity" / "metrics.parquet").to_pylist()
    assert {r["targets"] for r in rows} <= {"all", "cold"}
    with pytest.raises(UserError, match="no target that is repeated"):
        compare(warehouse, ["popularity", "sasrec"], targets="repeated")


def test_validation_counts_repeated_targets_as_misses() -> None:
    ranks: Ranks = worlds.popularity_ranks(worlds.dataset(MIXED, 6), "validation")
    assert (ranks.filtered > 6).tolist() == [True, False, False, False]
