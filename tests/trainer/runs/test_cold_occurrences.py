"""Every occurrence of a cold item, as PMMRec and MMSR count: counts and ranks by hand.

The items 0 and 1 are warm, with 15 and 12 training interactions; the items 2, 3 and 4 have 1, 3
and 1.
"""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from features.dataset import cold_counts, load_dataset
from features.errors import UserError
from features.result_tables import read_predictions_table
from features.warehouse import Warehouse
from retrieval.metrics import per_user
from retrieval.significance import bootstrap, paired_test
from tests.trainer import worlds
from trainer.analysis.compare import compare
from trainer.data.batches import TrainingData
from trainer.data.windows import WindowSampling
from trainer.evaluation.protocol import OCCURRENCES
from trainer.runs.evaluate import EvalReport, Sample, evaluate
from trainer.runs.grid_file import parse_grid
from trainer.runs.recipes import fill_recipe, read_recipe
from trainer.runs.run import Run
from trainer.runs.train import train_run

SEQUENCES = [
    *[[0, 1, 0, 1]] * 10,
    [0, 2, 1, 3, 0, 1],  # user 10: occurrences at the training positions 1 and 3
    [4, 0, 1, 2],  # the first has no history; 2 is the test target
    [3, 0],  # too short for held-out targets, and the occurrence has no history
    [0, 3],  # user 13: an occurrence at training position 1
    [1, 0, 2, 4],  # 2 is the validation target, 4 the test target
]
TARGETS = {  # (user, length of the history) -> item and its rank, filtered; all are tied with 0
    (10, 1): (2, 4),
    (10, 3): (3, 2),
    (13, 1): (3, 4),
    (11, 3): (2, 2),
    (14, 3): (4, 2),
}


def trained(warehouse: Warehouse, model: str, **settings: Any) -> Run:
    pairs = ["device=cpu", *(f"{name}={value}" for name, value in settings.items())]
    name = "-".join([model, *(str(value) for value in settings.values())])
    run = worlds.begin(warehouse, model, settings=pairs, name=name)
    train_run(run)
    return run


def occurrence_rows(report: EvalReport, ranker: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (row["seen"], row["metric"]): row
        for row in report.rows
        if row["targets"] == OCCURRENCES and row["ranker"] == ranker
    }


def test_the_counts_are_those_of_the_papers(warehouse: Warehouse) -> None:
    worlds.prepare(warehouse, SEQUENCES, 5)
    dataset = load_dataset(warehouse, "world")
    assert dataset.train_counts.tolist() == [15, 12, 1, 3, 1]
    assert cold_counts(dataset) == (3, 6)
    occurrences = dataset.cold_occurrences()
    assert list(zip(occurrences.users, occurrences.targets - occurrences.starts, strict=True)) == [
        (10, 1), (10, 3), (13, 1)
    ]  # fmt: skip
    assert dataset.items[occurrences.targets].tolist() == [2, 3, 3]


def test_training_has_no_interaction_with_a_cold_item(warehouse: Warehouse) -> None:
    world = worlds.dataset(SEQUENCES, 5)
    world = replace(world, times=np.arange(len(world.items)))
    data = TrainingData(world, worlds.features(5), torch.device("cpu"), hold_out_cold=True)
    assert data.train.counts_N.tolist() == [15, 12, 0, 0, 0]
    offsets = data.train.histories.offsets
    histories = [data.train.histories.items[begin:end].tolist() for begin, end in pairwise(offsets)]
    assert histories == [*[[0, 1]] * 11, [0], [0], [0], [1, 0]]
    users, items = torch.arange(15)[:, None], torch.arange(5)[None, :]
    assert data.train.seen(users, items).nonzero()[:, 1].unique().tolist() == [0, 1]
    plan = WindowSampling(length=4, stride=3, every_target=True)
    _, batches = data.epoch(plan, batch_size=4, seed=0, epoch=0)
    windows = {}
    for batch in batches:
        sequences = batch.sequences
        assert sequences.times_BL is not None
        assert sequences.request_B is not None
        assert batch.ends_B is not None
        for row, user in enumerate(batch.users_B.tolist()):
            length = int(sequences.lengths_B[row])
            times = sequences.times_BL[row, :length].tolist()
            windows[user] = sequences.items_BL[row, :length].tolist()
            assert world.items[times].tolist() == windows[user]
            assert int(sequences.request_B[row]) == times[-1] + 1  # the time of the next one
            assert batch.ends_B[row] == offsets[user + 1]
    assert windows == {**{user: [0, 1] for user in range(11)}, 14: [1, 0]}


@pytest.mark.parametrize("index", ["faiss", "torch"])
def test_ranks_and_metrics_by_hand(warehouse: Warehouse, index: str) -> None:
    worlds.prepare(warehouse, SEQUENCES, 5)
    run = trained(warehouse, "popularity", hold_out_cold=True)
    report = evaluate(warehouse, run, index=index)
    table = read_predictions_table(run.folder / "predictions.parquet").to_pylist()
    stored = {
        (row["user"], row["history"]): (row["item"], row["rank_filtered"], row["rank_kept"])
        for row in table
        if row["cold"] and row["split"] != "validation"
    }
    assert stored == {key: (item, rank, 5) for key, (item, rank) in TARGETS.items()}
    splits = {(row["user"], row["history"]): row["split"] for row in table}
    assert [splits[key] for key in TARGETS] == ["train", "train", "train", "test", "test"]
    rows = occurrence_rows(report, "popularity")
    assert {row["split"] for row in rows.values()} == {"test"}
    assert rows["filtered", "MRR"]["value"] == pytest.approx((1 / 4 + 1 / 4 + 3 / 2) / 5)
    assert rows["kept", "MRR"]["value"] == pytest.approx(1 / 5)
    assert rows["filtered", "MRR"]["users"] == 5
    assert OCCURRENCES in " ".join(report.protocol)
    assert occurrence_rows(report, "transitions")


def test_intervals_resample_users_with_all_their_sequences(warehouse: Warehouse) -> None:
    worlds.prepare(warehouse, SEQUENCES, 5)
    report = evaluate(
        warehouse, trained(warehouse, "popularity", hold_out_cold=True), index="torch"
    )
    values = per_user(np.array([rank for _, rank in TARGETS.values()]))["MRR"]
    users = np.array([user for user, _ in TARGETS])
    low, high = bootstrap(values[:, None], groups=users)
    row = occurrence_rows(report, "popularity")["filtered", "MRR"]
    assert (row["low"], row["high"]) == pytest.approx((low[0], high[0]))


def test_a_run_that_has_learned_the_occurrences_has_no_rows(warehouse: Warehouse) -> None:
    worlds.prepare(warehouse, SEQUENCES, 5)
    ordinary = trained(warehouse, "popularity")
    report = evaluate(warehouse, ordinary, index="torch")
    assert {row["targets"] for row in report.rows} >= {"all", "cold"}
    assert not occurrence_rows(report, "popularity")
    table = read_predictions_table(ordinary.folder / "predictions.parquet").to_pylist()
    assert {row["split"] for row in table} == {"validation", "test"}
    evaluate(warehouse, trained(warehouse, "popularity", hold_out_cold=True), index="torch")
    with pytest.raises(UserError, match=r"'popularity' has learned.*hold_out_cold=true"):
        compare(warehouse, ["popularity-True", "popularity"], targets=OCCURRENCES)


def test_runs_are_compared_sequence_by_sequence(warehouse: Warehouse) -> None:
    worlds.prepare(warehouse, SEQUENCES, 5)
    names = []
    for model in ("popularity", "itemknn"):
        run = trained(warehouse, model, hold_out_cold=True)
        evaluate(warehouse, run, index="torch")
        names.append(run.name)
    comparison = compare(warehouse, names, targets=OCCURRENCES, metrics=["MRR"])
    assert comparison.users == 5
    values = {(line.seen, line.system): line.value for line in comparison.lines}
    assert values["filtered", names[0]] == pytest.approx(0.4)
    with pytest.raises(UserError, match=r"validation"):
        compare(warehouse, names, targets=OCCURRENCES, split="validation")
    others = compare(warehouse, names, targets="cold", metrics=["MRR"])
    assert others.users == 2  # the held-out targets of the test split alone


def test_a_sample_of_users_has_their_occurrences(warehouse: Warehouse) -> None:
    worlds.prepare(warehouse, SEQUENCES, 5)
    run = trained(warehouse, "popularity", hold_out_cold=True)
    everyone = evaluate(warehouse, run, index="torch")
    some = evaluate(warehouse, run, index="torch", sample=Sample(users=6, seed=3))
    sampled = occurrence_rows(some, "popularity")
    assert not sampled or sampled["kept", "MRR"]["users"] < 5
    assert occurrence_rows(everyone, "popularity")["kept", "MRR"]["users"] == 5


@pytest.mark.parametrize("held_out", [True, False])
def test_initial_weights_may_not_have_learned_the_occurrences(
    warehouse: Warehouse, held_out: bool
) -> None:
    worlds.prepare(warehouse, SEQUENCES, 5)
    small = {"dim": 4, "heads": 2, "hidden": 4, "length": 4, "epochs": 1}
    first = trained(warehouse, "sasrec", hold_out_cold=held_out, **small)
    pairs = ["device=cpu", "hold_out_cold=true", *(f"{k}={v}" for k, v in small.items())]
    if held_out:
        assert worlds.begin(warehouse, "sasrec", settings=pairs, init=first.name).copied_weights
        return
    with pytest.raises(UserError, match=r"hold_out_cold=true.*have learned.*of world"):
        worlds.begin(warehouse, "sasrec", settings=pairs, init=first.name)


def test_without_warm_items_nothing_can_be_learned(warehouse: Warehouse) -> None:
    worlds.prepare(warehouse, [[0, 1, 2, 3]] * 5, 4)
    with pytest.raises(UserError, match=r"without cold items.*hold_out_cold"):
        worlds.begin(warehouse, "popularity", settings=["device=cpu", "hold_out_cold=true"])


def test_signs_of_a_user_change_together() -> None:
    a, b = np.array([1.0, 1.0, 0.5]), np.array([0.0, 0.0, 0.0])
    by_user = paired_test(a, b, groups=np.array([7, 7, 9]))
    assert by_user.difference == pytest.approx(2.5 / 3)
    assert by_user.p_value == pytest.approx(2 / 4)  # of +2 and +0.5: 2.5 and -2.5 of four sums
    assert paired_test(a, b).p_value == pytest.approx(2 / 8)
    each = paired_test(a, b, groups=np.array([0, 1, 2]))
    assert each == paired_test(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"runs": {"model": "sasrec"}}, r"not learned.*hold_out_cold = true"),
        ({"runs": {"model": "sasrec", "hold_out_cold": False}}, r"hold_out_cold = true"),
        ({"runs": {"model": "sasrec", "hold_out_cold": [True, False]}}, r"hold_out_cold = true"),
        ({"split": "validation"}, r"split='test'.*'validation'"),
    ],
)
def test_grids_ask_for_runs_that_hold_the_occurrences_out(
    changes: dict[str, Any], message: str | None
) -> None:
    document = {"targets": OCCURRENCES, "runs": {"model": "sasrec", "hold_out_cold": True}}
    if message is None:
        assert parse_grid(Path("grid.toml"), document).targets == OCCURRENCES
        return
    with pytest.raises(UserError, match=message):
        parse_grid(Path("grid.toml"), {**document, **changes})


@pytest.mark.parametrize("name", ["mmsr/table-8", "pmmrec/table-7"])
def test_the_papers_tables_rank_occurrences(name: str) -> None:
    grid = fill_recipe(read_recipe(name), ["a"])
    assert grid.targets == OCCURRENCES
    assert all(entry.settings["hold_out_cold"] is True for entry in grid.combinations)
