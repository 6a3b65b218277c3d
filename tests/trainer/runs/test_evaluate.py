"""Evaluations: rows about recommended items, samples of users, results of earlier versions."""

from typing import Any

import numpy as np
import pytest

from features.atomic_files import read_table, write_table
from features.dataset import Dataset
from features.documents import read_toml, write_toml
from features.warehouse import Warehouse
from retrieval.list_metrics import LIST_METRICS, count_recommended, list_metrics
from retrieval.metrics import UNRANKED, per_user
from tests.trainer import worlds
from trainer.analysis.compare import compare
from trainer.analysis.curves import read_curves
from trainer.analysis.report import build_report
from trainer.evaluation.search import CatalogueSearch
from trainer.runs.evaluate import Sample, evaluate
from trainer.runs.read import has_current_protocol, read_records
from trainer.runs.run import Run, open_run
from trainer.runs.spec import RunSpec
from trainer.runs.train import train_run

SEQUENCES = [[(user * 3 + k * k) % 17 for k in range(4 + user % 4)] for user in range(30)]
FILES = ("metrics.parquet", "predictions.parquet")


def trained(warehouse: Warehouse, model: str, **settings: Any) -> Run:
    """A run of a small model, trained for an epoch."""
    own = {"epochs": 1} | settings
    if model == "sasrec":
        own |= {"dim": 8, "heads": 2, "hidden": 8, "length": 5}
    pairs = ["device=cpu", *(f"{name}={value}" for name, value in own.items())]
    run = worlds.begin(warehouse, model, settings=pairs, name=model)
    train_run(run)
    return run


@pytest.mark.parametrize("model", ["popularity", "transitions", "sasrec"])
@pytest.mark.parametrize("index", ["faiss", "torch"])
def test_rows_of_recommended_items_are_those_of_the_lists(
    warehouse: Warehouse, model: str, index: str
) -> None:
    worlds.prepare(warehouse, SEQUENCES, 17)
    run = trained(warehouse, model)
    report = evaluate(warehouse, run, index=index)
    dataset: Dataset = run.data.dataset
    rankers = {row["ranker"] for row in report.rows}
    assert rankers == {model, "popularity", "transitions"}
    rows = {
        (row["ranker"], row["seen"], row["metric"]): row
        for row in report.rows
        if row["split"] == "test" and row["metric"] in LIST_METRICS
    }
    assert len(rows) == len(rankers) * 2 * len(LIST_METRICS)
    users = dataset.eval_split("test")
    run_search = CatalogueSearch(run.model, run.data, index="torch", batch_size=512)
    for seen in ("filtered", "kept"):
        lists = run_search.best_for_users(users, 10, keep_seen=seen == "kept")[1]
        expected = list_metrics(count_recommended(lists, 17), dataset.train_counts, dataset.cold)
        values = {name: rows[model, seen, name]["value"] for name in LIST_METRICS}
        assert values == pytest.approx(expected, abs=1e-12)
    stored = read_table(run.folder / "metrics.parquet").to_pylist()
    assert sum(row["metric"] in LIST_METRICS for row in stored) == 2 * len(rows)


def test_a_sample_of_users_is_ranked_and_not_stored(warehouse: Warehouse) -> None:
    worlds.prepare(warehouse, SEQUENCES, 17)
    run = trained(warehouse, "sasrec")
    whole = evaluate(warehouse, run, index="faiss")
    before = [(run.folder / name).read_bytes() for name in FILES]
    samples = [
        evaluate(warehouse, run, index="faiss", sample=Sample(users=7, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert samples[0].rows == samples[1].rows != samples[2].rows
    assert {(row["split"], row["users"]) for row in samples[0].rows if row["targets"] == "all"} == {
        ("test", 7)
    }
    everyone = evaluate(warehouse, run, index="faiss", sample=Sample(users=1000))
    assert everyone.rows == [row for row in whole.rows if row["split"] == "test"]
    assert [(run.folder / name).read_bytes() for name in FILES] == before


@pytest.mark.parametrize(("limit", "users"), [(0, 30), (7, 7), (30, 30), (20_000, 30)])
def test_early_stopping_validates_on_a_sample(warehouse: Warehouse, limit: int, users: int) -> None:
    worlds.prepare(warehouse, SEQUENCES, 17)
    run = trained(warehouse, "sasrec", monitor_users=limit)
    rows = read_table(run.folder / "metrics.parquet").to_pylist()
    assert {row["users"] for row in rows if row["split"] == "validation"} == {users}
    assert run.task.validate(run.config).metrics == run.task.validate(run.config).metrics
    report = evaluate(warehouse, run, index="faiss")
    assert {row["users"] for row in report.rows if row["targets"] == "all"} == {30}


def test_a_run_without_the_setting_validates_on_all_users(warehouse: Warehouse) -> None:
    worlds.prepare(warehouse, SEQUENCES, 17)
    run = trained(warehouse, "sasrec", monitor_users=7, epochs=2)
    config = run.folder / "config.toml"
    document = read_toml(config, "")
    del document["train"]["monitor_users"]
    write_toml(config, document)
    spec = RunSpec.read(warehouse, run.folder)
    assert spec.train.monitor_users == 0
    assert "monitor_users" not in spec.identity()["train"]
    older = open_run(warehouse, run.folder)
    assert older.task.validate(older.config).users == 30


@pytest.mark.parametrize("model", ["sasrec", "mmsr", "pmmrec"])
def test_a_run_of_an_earlier_version_reads_features_as_they_are(
    warehouse: Warehouse, model: str
) -> None:
    """Its ``config.toml`` does not name ``centre``, which other models do not have at all."""
    worlds.prepare(warehouse, SEQUENCES, 17)
    worlds.extract(warehouse, worlds.features(17))
    small = ["device=cpu", "dim=8", "heads=2", "hidden=8", "length=5"]
    extra = [] if model == "sasrec" else ["centre=false", "fusion_heads=2"]
    run = worlds.begin(warehouse, model, settings=[*small, *extra], name="earlier")
    config = run.folder / "config.toml"
    document = read_toml(config, "")
    document["model"].pop("centre", None)
    write_toml(config, document)
    older = open_run(warehouse, run.folder)
    assert older.model.state_dict().keys() == run.model.state_dict().keys()
    assert getattr(older.spec.settings, "centre", False) is False


def without_protocol(run: Run) -> None:
    """Leave the files that an earlier version wrote: no version, no rows of recommended items."""
    table = read_table(run.folder / "predictions.parquet").replace_schema_metadata(None)
    write_table(run.folder / "predictions.parquet", table)
    table = read_table(run.folder / "metrics.parquet")
    rows = [row for row in table.to_pylist() if row["metric"] not in LIST_METRICS]
    write_table(run.folder / "metrics.parquet", table.from_pylist(rows, schema=table.schema))


def test_results_of_an_earlier_version_are_marked_and_still_printed(warehouse: Warehouse) -> None:
    worlds.prepare(warehouse, SEQUENCES, 17)
    runs = [trained(warehouse, model) for model in ("popularity", "sasrec")]
    for run in runs:
        evaluate(warehouse, run, index="faiss")
    names = [run.name for run in runs]

    def shown() -> tuple[str, str]:
        records = read_records(warehouse, names)
        page = build_report(warehouse, records, read_curves(records))
        return "\n".join(compare(warehouse, names).protocol), page

    assert not any("earlier protocol" in text for text in shown())
    assert "repeated targets" in shown()[1]
    assert all(name in shown()[1] for name in LIST_METRICS)
    without_protocol(runs[1])
    assert [has_current_protocol(run.folder) for run in runs] == [True, False]
    for text in shown():
        assert text.count("earlier protocol") == 1
        assert "mmrec eval --run sasrec" in text
    evaluate(warehouse, runs[1], index="faiss")
    assert not any("earlier protocol" in text for text in shown())


@pytest.mark.parametrize("n_items", [3, 40])
def test_an_untrained_model_is_at_chance_where_items_are_repeated(n_items: int) -> None:
    """Users pick items at random; the standard error of each mean is below .022."""
    rng = np.random.default_rng(0)
    all_ranks = []
    for seed in range(20):
        world = worlds.dataset(rng.integers(0, n_items, (10, 12)).tolist(), n_items)
        features = worlds.features(n_items, missing=False)
        model = worlds.build("sasrec", features, seed=seed)
        all_ranks += [
            worlds.ranks(model, world, features, split) for split in ("validation", "test")
        ]
    kept = np.concatenate([ranks.kept for ranks in all_ranks])
    places = np.arange(1, n_items + 1)
    for values, chances in (
        (1 / kept, 1 / places),
        (per_user(kept)["HR@5"], places <= 5),
        (per_user(kept)["NDCG@10"], (places <= 10) / np.log2(places + 1)),
    ):
        assert abs(values.mean() - chances.mean()) < 0.07
    if n_items == 3:  # nearly every user has had the target
        filtered = np.concatenate([ranks.filtered for ranks in all_ranks])
        assert (filtered == UNRANKED).mean() > 0.95
