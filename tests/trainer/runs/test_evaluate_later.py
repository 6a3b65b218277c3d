"""The evaluation of a run on a later preparation against brute force, and what it leaves out."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from features.atomic_files import read_table
from features.dataset import load_dataset
from features.errors import UserError
from features.schema import LATER_PREDICTIONS_SCHEMA, METRICS_SCHEMA
from features.sql_views import query
from features.warehouse import Warehouse
from retrieval.metrics import per_user
from tests.trainer import worlds
from tests.trainer.runs.test_later import IDS, LATER, begin, histories, prepare
from trainer.checkpoint import save_weights
from trainer.runs.evaluate import EvalReport, Sample, evaluate
from trainer.runs.evaluate_later import evaluate_later
from trainer.runs.later import load_as_trained, open_as_trained, open_current
from trainer.runs.learned_interactions import LearnedInteractions, read_learned
from trainer.runs.read import read_metrics, read_record
from trainer.runs.recommend import Predictor
from trainer.runs.train import train_run

BOUGHT = ["new1", "i0", "new2"]


@pytest.fixture(autouse=True)
def no_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resampling the users takes most of the time, and the intervals are tested elsewhere."""
    monkeypatch.setattr(
        "trainer.runs.evaluation_rows.bootstrap",
        lambda matrix, groups: (matrix.min(0), matrix.max(0)),
    )


def later_histories(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return a third of the users as they were, a third with one and a third with two more items.

    The last user is new.
    """
    more = [[*row, *BOUGHT[: u % 3]] for u, row in enumerate(rows)]
    return [*more, ["i1", "i2", "new1", "i4"]]


def begin_later(warehouse: Warehouse, model: str) -> Path:
    """Create a run with random weights, and prepare its dataset with more interactions."""
    folder = begin(warehouse, model)
    prepare(warehouse, LATER, later_histories(histories()))
    return folder


def values(report: EvalReport, split: str, targets: str, ranker: str) -> dict[str, float]:
    """Return the metrics of the ranking that keeps seen items."""
    return {
        row["metric"]: row["value"]
        for row in report.rows
        if (row["split"], row["targets"], row["ranker"], row["seen"])
        == (split, targets, ranker, "kept")
    }


def expected_ranks(predictor: Predictor, split: str) -> list[tuple[bool, int]]:
    """Rank each target that is left by the scores of all items: whether it is new, and its rank.

    A target without a score has the last place.
    """
    before = [row for row in histories() if len(row) >= 3]
    read = {(u, len(row) - 2 - back) for u, row in enumerate(before) for back in range(len(row))}
    reads_new = predictor.run.model.encodes_new_items
    back = {"validation": 2, "test": 1}[split]
    now = [
        [name for name in row if name != "i3"] for row in later_histories(histories())
    ]  # i3 has left the catalogue
    ranks = []
    for u, row in enumerate(now):
        target, history = row[-back], row[:-back]
        trained = [
            n for at, n in enumerate(before[u] if u < len(before) else []) if (u, at) in read
        ]
        if history.count(target) < trained.count(target):
            continue
        known = [name for name in history if name in IDS or reads_new]
        items = [predictor.item(name) for name in known]
        scores, listed = predictor.for_history(items, 100, keep_seen=True)
        names = predictor.item_ids.take(listed[0]).to_pylist()
        by_name = dict(zip(names, scores[0].tolist(), strict=True))
        score = by_name.get(target, -np.inf)
        beaten = sum(other >= score for other in by_name.values())
        ranks.append((target not in IDS, len(LATER) if target not in by_name else beaten))
    return ranks


@pytest.mark.parametrize("model", ["mmsrec", "sasrec"])
def test_ranks_of_the_targets_that_are_left_against_brute_force(
    warehouse: Warehouse, model: str
) -> None:
    folder = begin_later(warehouse, model)
    report = evaluate_later(warehouse, folder, "world", index="faiss")
    predictor = Predictor(warehouse, open_current(warehouse, folder), index="torch")
    for split in ("validation", "test"):
        ranks = expected_ranks(predictor, split)
        assert len(ranks) > 5
        for targets, kinds in (("all", (0, 1)), ("new-item", (1,)), ("known-item", (0,))):
            chosen = np.array([rank for is_new, rank in ranks if is_new in kinds])
            got = values(report, split, targets, model)
            if not len(chosen):
                assert not got
                continue
            wanted = {name: float(v.mean()) for name, v in per_user(chosen).items()}
            assert {name: got[name] for name in wanted} == pytest.approx(wanted, abs=1e-9)
    assert {row["ranker"] for row in report.rows} == {model, "popularity", "transitions"}
    assert {row["phase"] for row in report.rows} == {"later"}


def test_what_was_trained_on_and_validated_by_is_counted(warehouse: Warehouse) -> None:
    """Of 30 users, a third has the split of the training, a third one more item, a third two."""
    folder = begin(warehouse, "popularity")
    prepare(warehouse, IDS, [[*row, *["i0", "i1"][: u % 3]] for u, row in enumerate(histories())])
    facts = evaluate_later(warehouse, folder, "world", index="torch").later
    assert facts is not None
    assert facts.kind == "later preparation"
    assert facts.validation_targets == {"validation": 10, "test": 0}
    assert facts.trained_targets == {"validation": 0, "test": 0}
    prepare(warehouse, IDS, [row[: len(row) - u % 3] for u, row in enumerate(histories())])
    facts = evaluate_later(warehouse, folder, "world", index="torch").later
    assert facts is not None
    assert facts.validation_targets == {"validation": 10, "test": 10}
    assert facts.trained_targets == {"validation": 20, "test": 10}


def test_an_interaction_of_a_trained_pair_is_new_if_it_is_one_more(warehouse: Warehouse) -> None:
    """The training has read i0, i1, i2 and, as the validation target, i3 of each user."""
    histories_now = {
        "i0 i1 i2 i3 i4": True,  # the test target of the training
        "i0 i1 i2 i3": False,
        "i0 i1 i2 i3 i4 i1": True,
        "i2 i3 i4 i1": False,  # as often as in training
        "i0 i1 i2 i3 i4 i3": True,
    }
    prepare(warehouse, IDS, [["i0", "i1", "i2", "i3", "i4"]] * len(histories_now))
    run = worlds.begin(warehouse, "popularity", settings=["device=cpu"], name="p")
    save_weights(run.weights, run.model, run.spec.identity())
    prepare(warehouse, IDS, [row.split() for row in histories_now])
    evaluate_later(warehouse, run.folder, "world", index="torch")
    rows = read_table(run.folder / "later" / "world" / "predictions.parquet").to_pylist()
    users = [row["user"] for row in rows if row["split"] == "test"]
    assert users == [u for u, is_left in enumerate(histories_now.values()) if is_left]


def test_results_are_stored_apart_and_marked(warehouse: Warehouse) -> None:
    folder = begin(warehouse, "sasrec")
    evaluate(warehouse, open_as_trained(warehouse, folder), index="torch")
    strict = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    rows = read_metrics(read_record(warehouse, folder.name))
    prepare(warehouse, LATER, later_histories(histories()))
    report = evaluate_later(warehouse, folder, "world", index="torch")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == strict
    assert read_metrics(read_record(warehouse, folder.name)) == rows
    shown = query(warehouse, "SELECT DISTINCT phase FROM metrics").to_pylist()
    assert shown == [{"phase": "eval"}]
    for name, schema in (("metrics", METRICS_SCHEMA), ("predictions", LATER_PREDICTIONS_SCHEMA)):
        table = read_table(folder / "later" / "world" / f"{name}.parquet")
        assert table.schema.remove_metadata() == schema
        facts = json.loads(table.schema.metadata[b"later"])
        assert (facts["kind"], facts["items"], facts["new_items"]) == ("later preparation", 13, 2)
    assert table.column("item_id").to_pylist() == [
        LATER[item] for item in table.column("item").to_pylist()
    ]
    sample = evaluate_later(warehouse, folder, "world", index="torch", sample=Sample(users=4))
    assert {row["users"] for row in sample.rows if row["targets"] == "all"} == {4}
    everyone = evaluate_later(warehouse, folder, "world", index="torch", sample=Sample(users=99))
    assert everyone.rows == [row for row in report.rows if row["split"] == "test"]
    assert {path.name for path in (folder / "later" / "world").iterdir()} == {
        "metrics.parquet",
        "predictions.parquet",
    }


def test_training_removes_the_results(warehouse: Warehouse) -> None:
    worlds.prepare(warehouse, [[(u + k) % 9 for k in range(6)] for u in range(20)], 9)
    run = worlds.begin(warehouse, "popularity", settings=["device=cpu"], name="p")
    train_run(run)
    report = evaluate_later(warehouse, run.folder, "world", index="torch")
    assert report.later is not None
    assert report.later.kind == "same preparation"
    assert (run.folder / "later").exists()
    train_run(run)
    assert not (run.folder / "later").exists()


def test_another_dataset_and_what_is_refused(warehouse: Warehouse) -> None:
    folder = begin(warehouse, "sasrec")
    own = warehouse.dataset_dir("world")
    before = warehouse.root / "saved"
    shutil.copytree(own, before)
    prepare(warehouse, IDS, [row[:-1] for row in histories()])
    own.rename(warehouse.dataset_dir("other"))
    shutil.move(before, own)
    _rename(warehouse, "other")
    with pytest.raises(UserError, match="no target of 'other' is left"):
        evaluate_later(warehouse, folder, "other", index="torch", sample=Sample(users=5))
    (folder / "learned_interactions.parquet").unlink()
    with pytest.raises(UserError, match="train again"):
        evaluate_later(warehouse, folder, "world", index="torch")


def _rename(warehouse: Warehouse, name: str) -> None:
    path = warehouse.dataset_dir(name) / "dataset.json"
    document = json.loads(path.read_text())
    del document["checksum"]
    path.write_text(json.dumps({**document, "name": name}))
    assert load_dataset(warehouse, name).info.name == name


@pytest.mark.parametrize("change", ["items", "features"])
def test_the_strict_evaluation_names_the_remedy(warehouse: Warehouse, change: str) -> None:
    folder = begin(warehouse, "mmsrec")
    if change == "items":
        prepare(warehouse, LATER, histories())
    else:
        shutil.rmtree(warehouse.dataset_dir("world") / "features")
        worlds.extract(warehouse, worlds.features(len(IDS)), fingerprint=" ".join(IDS))
    with pytest.raises(UserError, match=r"mmrec eval --run mmsrec-1 --dataset world"):
        load_as_trained(open_as_trained(warehouse, folder))


def test_a_run_knows_the_interactions_of_its_initial_weights(warehouse: Warehouse) -> None:
    folder = begin(warehouse, "mmsrec")
    first = read_learned(folder)
    assert first.trained.sum() == sum(len(row) - 2 for row in histories())
    assert first.read.sum() == first.trained.sum() + 30
    prepare(warehouse, LATER, later_histories(histories()))
    small = [f"{key}={value}" for key, value in worlds.small_pairs("mmsrec").items()]
    settings = [*small, "device=cpu"]
    run = worlds.begin(warehouse, "mmsrec", settings=settings, name="next", init=folder.name)
    second = read_learned(run.folder)
    assert set(first.pairs) < set(second.pairs)
    (folder / "learned_interactions.parquet").unlink()
    run = worlds.begin(warehouse, "mmsrec", settings=settings, name="last", init=folder.name)
    with pytest.raises(UserError, match="initial weights"):
        read_learned(run.folder)


@pytest.mark.parametrize("seed", range(3))
def test_merged_interactions_are_the_largest_counts(seed: int) -> None:
    rng = np.random.default_rng(seed)

    def drawn() -> tuple[LearnedInteractions, Any]:
        trained, validation = rng.integers(0, 9, 12), rng.integers(0, 9, 4)
        counts = [
            (np.sum(trained == pair), np.sum(trained == pair) + np.sum(validation == pair))
            for pair in range(9)
        ]
        return LearnedInteractions.of(trained, validation), np.array(counts).T

    (one, expected_one), (other, expected_other) = drawn(), drawn()
    merged = one.merged(other).counts(np.arange(9))
    assert np.array_equal(merged, np.maximum(expected_one, expected_other))
    assert np.array_equal(LearnedInteractions.none().counts(np.arange(3)), np.zeros((2, 3)))
