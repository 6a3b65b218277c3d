"""SQL views of the runs: ``runs``, ``metrics`` and ``predictions``."""

from collections.abc import Callable, Mapping, Set
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from features.atomic_files import read_errors
from features.checksums import verify
from features.documents import read_toml
from features.errors import DamagedError, UserError
from features.result_tables import metrics_sql, predictions_sql
from features.schema import METRICS_SCHEMA, PREDICTIONS_SCHEMA
from features.sql_text import empty_table, quoted, union_all
from features.warehouse import DatasetInfo, Warehouse

_SELECTS = {"metrics": metrics_sql, "predictions": predictions_sql}
_SCHEMAS = {"metrics": METRICS_SCHEMA, "predictions": PREDICTIONS_SCHEMA}
_RUN_COLUMNS = (
    *("run", "dataset", "model", "created", "seed", "features", "parameters", "control"),
    "settings",
)


def create_run_views(
    db: duckdb.DuckDBPyConnection,
    warehouse: Warehouse,
    datasets: Mapping[str, DatasetInfo],
    leave_out: Callable[[UserError], None],
    names: Set[str] = frozenset(),
) -> None:
    """Create ``runs``, ``metrics`` and ``predictions``.

    Predictions hold item indices, so they are shown only if the run's dataset still has the
    preparation that the run was trained on.

    Args:
        db: Connection that gets the views.
        warehouse: Warehouse with the runs.
        datasets: Prepared datasets.
        leave_out: Called with the reason for each run or table that is left out.
        names: Names in the statement that will be run. Tables that it reads are verified.
    """
    rows: list[dict[str, Any]] = []
    queries: dict[str, list[str]] = {kind: [] for kind in _SELECTS}
    for folder in warehouse.no_runs():
        leave_out(UserError(f"{folder}, which has no config.toml: it was killed when it began"))
    for name in warehouse.runs():
        folder = warehouse.runs_dir / name
        try:
            row, selects = _run_row(folder), _result_selects(folder, names)
        except UserError as error:
            leave_out(error)
            continue
        rows.append(row)
        info = datasets.get(row["dataset"])
        if "predictions" in selects and (not info or info.fingerprint != row["fingerprint"]):
            del selects["predictions"]
            dataset = row["dataset"]
            reason = f"whose items are those of another preparation of {dataset}; train again"
            if info is None and warehouse.is_prepared(dataset):
                reason = f"whose dataset {dataset} is left out"
            leave_out(UserError(f"the predictions of {name}, {reason}"))
        columns = f"{quoted(name)} AS run, {quoted(row['dataset'])} AS dataset, *"
        for kind, select in selects.items():
            queries[kind].append(f"SELECT {columns} FROM ({select})")
    keys = [pa.field("run", pa.string()), pa.field("dataset", pa.string())]
    for kind, schema in _SCHEMAS.items():
        empty = f"SELECT * FROM {empty_table(pa.schema([*keys, *schema]))}"
        db.execute(f"CREATE VIEW {kind} AS {union_all(queries[kind], empty)}")
    _create_runs(db, rows)


def _create_runs(db: duckdb.DuckDBPyConnection, rows: list[dict[str, Any]]) -> None:
    """Create the table ``runs``."""
    columns = ", ".join(f"unnest(${key}::VARCHAR[]) AS {key}" for key in _RUN_COLUMNS)
    db.execute(
        "CREATE TABLE runs AS SELECT run, dataset, model, created::TIMESTAMP AS created,"
        " seed::BIGINT AS seed, features, parameters::BIGINT AS parameters, control,"
        " settings"
        f" FROM (SELECT {columns})",
        {key: [row[key] for row in rows] for key in _RUN_COLUMNS},
    )


def _result_selects(folder: Path, names: Set[str]) -> dict[str, str]:
    """Return a SELECT over each result table that a run's folder has.

    Raises:
        UserError: A table cannot be read, or has other columns.
    """
    selects = {}
    for kind, select in _SELECTS.items():
        path = folder / f"{kind}.parquet"
        if path.exists():
            with read_errors(path, "evaluate the run again"):
                if kind in names:
                    verify(path)
                selects[kind] = select(folder)
    return selects


def _run_row(folder: Path) -> dict[str, Any]:
    """Return a run's row of the table ``runs``, and the fingerprint of its items."""
    path = folder / "config.toml"
    document = read_toml(path, "remove the run's folder")
    try:
        run = document["run"]
        return {
            "run": folder.name,
            "dataset": str(run["dataset"]),
            "model": str(run["model"]),
            "created": datetime.fromisoformat(run["created"]).isoformat(" "),
            "seed": str(int(document["train"]["seed"])),
            "fingerprint": str(run["fingerprint"]),
            "features": ", ".join(run["features"]),
            "parameters": str(int(run["parameters"])),
            "control": str(document["train"].get("control", "none")),
            "settings": ", ".join(run["changed"]) if "changed" in run else None,
        }
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{path} is damaged ({error}); remove the run's folder") from None
