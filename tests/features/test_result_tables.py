from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.result_tables import read_metrics_table, read_predictions_table
from features.schema import METRICS_SCHEMA, PREDICTIONS_SCHEMA
from features.sql_views import query
from features.warehouse import Warehouse
from tests.pipeline.backbones import tiny

METRIC = {
    "phase": "eval", "epoch": 3, "split": "test", "targets": "all", "ranker": "mmsrec",
    "metric": "HR@10", "value": 0.5, "low": 0.4, "high": 0.6, "users": 2,
}  # fmt: skip
PREDICTION = {
    "split": "test", "user": 0, "user_id": "u", "item": 1, "item_id": "b", "history": 1,
    "cold": True,
}  # fmt: skip


def write_run(folder: Path, *, fingerprint: str, version: str) -> None:
    """Write a run whose target ranks 1st without seen items, and 4th with them."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(
        '[run]\ndataset = "tiny"\nmodel = "m"\ncreated = "2026-01-01"\nfeatures = []\n'
        f'parameters = 1\nfingerprint = "{fingerprint}"\n[train]\nseed = 1\n'
    )
    filtered, kept = ("masked", "unmasked") if version == "0.1" else ("filtered", "kept")
    metrics = [METRIC | {"seen": seen} for seen in (filtered, kept, "none")]
    pq.write_table(pa.Table.from_pylist(metrics, schema=METRICS_SCHEMA), folder / "metrics.parquet")
    schema = PREDICTIONS_SCHEMA
    for index, name in ((7, kept), (8, filtered)):
        schema = schema.set(index, schema.field(index).with_name(f"rank_{name}"))
    predictions = [PREDICTION | {f"rank_{filtered}": 1, f"rank_{kept}": 4}]
    pq.write_table(pa.Table.from_pylist(predictions, schema=schema), folder / "predictions.parquet")


@pytest.mark.parametrize("version", ["0.1", "0.2"])
def test_files_of_either_version_are_read(tmp_path: Path, version: str) -> None:
    folder = tmp_path / "run"
    write_run(folder, fingerprint="f", version=version)
    metrics = read_metrics_table(folder / "metrics.parquet")
    assert metrics.schema.equals(METRICS_SCHEMA)
    assert metrics["seen"].to_pylist() == ["filtered", "kept", "none"]
    predictions = read_predictions_table(folder / "predictions.parquet")
    assert predictions.schema.equals(PREDICTIONS_SCHEMA)
    assert predictions.select(["rank_filtered", "rank_kept"]).to_pylist() == [
        {"rank_filtered": 1, "rank_kept": 4}
    ]


def test_the_views_show_both_versions_together(warehouse: Warehouse, tmp_path: Path) -> None:
    info = tiny.prepare(warehouse, tmp_path, ids=["a", "b"])
    for name, version in (("old", "0.1"), ("new", "0.2")):
        write_run(warehouse.runs_dir / name, fingerprint=info.fingerprint, version=version)
    messages: list[str] = []
    counts = query(
        warehouse,
        "SELECT seen, count(*) AS rows, count(DISTINCT run) AS runs FROM metrics"
        " GROUP BY seen ORDER BY seen",
        messages.append,
    )
    assert counts.to_pylist() == [
        {"seen": seen, "rows": 2, "runs": 2} for seen in ("filtered", "kept", "none")
    ]
    ranks = query(warehouse, "SELECT run, rank_filtered, rank_kept FROM predictions ORDER BY run")
    assert ranks.to_pylist() == [
        {"run": run, "rank_filtered": 1, "rank_kept": 4} for run in ("new", "old")
    ]
    assert messages == []


@pytest.mark.parametrize("read", [read_metrics_table, read_predictions_table])
def test_other_columns_are_refused(tmp_path: Path, read: object) -> None:
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"a": [1], "b": [2]}), path)
    assert callable(read)
    with pytest.raises(ValueError, match="its columns are a, b"):
        read(path)
    swapped = METRICS_SCHEMA if read is read_metrics_table else PREDICTIONS_SCHEMA
    pq.write_table(pa.table({name: ["x"] for name in swapped.names}), path)
    with pytest.raises(ValueError, match="its types are"):
        read(path)
