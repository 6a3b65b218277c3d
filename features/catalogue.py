"""The SQL side: read-only views over everything in a warehouse.

``items``, ``interactions``, ``splits``, ``features``, ``failures``, ``runs``, ``metrics`` and
``predictions`` are always there, empty when nothing has been written yet. Each feature table also
has a view of its own, ``features_<dataset>_<backbone>_<modality>``, whose embedding is always
``FLOAT[D]``.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from features.dataset import exact_pattern, parquet_sql, quoted
from features.errors import UserError
from features.schema import FAILURES, INTERACTIONS, ITEMS, METRICS, PREDICTIONS
from features.splits import split_sql
from features.store import FeatureStore, FeatureTable
from features.warehouse import Warehouse

VIEWS = (
    "items", "interactions", "splits", "features", "failures", "runs", "metrics", "predictions",
)  # fmt: skip
_RUN_COLUMNS = ("run", "dataset", "model", "created", "seed", "features", "parameters")


def connect(warehouse: Warehouse) -> duckdb.DuckDBPyConnection:
    """Open DuckDB in memory with the views; it can read the warehouse and nothing else."""
    db = duckdb.connect()
    datasets = warehouse.datasets()
    _view(db, "items", [_of(warehouse, name, "items") for name in datasets], ITEMS)
    _view(
        db,
        "interactions",
        [_of(warehouse, name, "interactions") for name in datasets],
        INTERACTIONS,
    )
    split = [_split_of(warehouse, name) for name in datasets]
    columns = "dataset, user, user_id, item, timestamp, position, split"
    empty = f"SELECT * FROM (SELECT *, '' AS split FROM {_empty(INTERACTIONS)})"
    db.execute(f"CREATE VIEW splits AS SELECT {columns} FROM ({_union(split, empty)})")
    _feature_views(db, warehouse, datasets)
    failed = [
        _of(warehouse, name, "failures")
        for name in datasets
        if any((warehouse.dataset_dir(name) / "failures").glob("*.parquet"))
    ]
    _view(db, "failures", failed, FAILURES)
    _run_views(db, warehouse)
    # Files are checked by the pattern that names them, hence the pattern of the root beside it.
    roots = (str(warehouse.root), exact_pattern(warehouse.root))
    db.execute(f"SET allowed_directories = [{', '.join(map(quoted, roots))}]")
    db.execute("SET enable_external_access = false")
    db.execute("SET lock_configuration = true")
    return db


def query(warehouse: Warehouse, sql: str) -> pa.Table:
    """Run one reading statement over the views.

    Raises:
        UserError: The statement cannot be parsed, would write, or fails.
    """
    db = connect(warehouse)
    try:
        statements = db.extract_statements(sql)
        if len(statements) != 1:
            raise UserError(f"give one SQL statement, not {len(statements)}")
        if statements[0].type != duckdb.StatementType.SELECT:
            kind = statements[0].type.name
            raise UserError(f"mmrec sql only reads; {kind} would change something; give a SELECT")
        # A WITH may hold a COPY or DELETE and still be called a SELECT; nested, it is refused.
        inner = statements[0].query.strip().rstrip(";")
        db.execute(f"EXPLAIN SELECT * FROM (\n{inner}\n)")
        result = db.sql(sql).to_arrow_table()
        assert isinstance(result, pa.Table)
        return result
    except duckdb.Error as error:
        line = re.sub(r"\s+", " ", str(error).split("\n\n")[0]).strip()
        hint = f"; the views are {', '.join(VIEWS)}" if "does not exist" in line else ""
        raise UserError(f"SQL: {line}{hint}") from None
    finally:
        db.close()


def _of(warehouse: Warehouse, dataset: str, table: str) -> str:
    source = parquet_sql(warehouse.dataset_dir(dataset) / table)
    return f"SELECT {quoted(dataset)} AS dataset, * FROM {source}"


def _split_of(warehouse: Warehouse, dataset: str) -> str:
    source = parquet_sql(warehouse.dataset_dir(dataset) / "interactions")
    return f"SELECT {quoted(dataset)} AS dataset, * FROM ({split_sql(source)})"


def _empty(schema: pa.Schema, first: str = "dataset") -> str:
    kinds = {
        "int32": "INTEGER", "int64": "BIGINT", "string": "VARCHAR", "double": "DOUBLE",
        "bool": "BOOLEAN",
    }  # fmt: skip
    columns = [f"NULL::{kinds[str(field.type)]} AS {field.name}" for field in schema]
    return f"(SELECT NULL::VARCHAR AS {first}, {', '.join(columns)} WHERE false)"


def _union(queries: list[str], empty: str) -> str:
    return " UNION ALL BY NAME ".join(f"({q})" for q in queries) if queries else empty


def _view(db: duckdb.DuckDBPyConnection, name: str, queries: list[str], schema: pa.Schema) -> None:
    empty = f"SELECT * FROM {_empty(schema)}"
    db.execute(f"CREATE VIEW {name} AS {_union(queries, empty)}")


def view_name(table: FeatureTable) -> str:
    """The view of one feature table: ``features_demo_hashed_image``."""
    parts = [table.dataset, table.backbone, table.modality]
    if table.level != "pooled":
        parts.append(table.level)
    return re.sub(r"\W+", "_", "features_" + "_".join(parts)).lower()


def _feature_views(db: duckdb.DuckDBPyConnection, warehouse: Warehouse, names: list[str]) -> None:
    store = FeatureStore(warehouse)
    tables = [(table, _width(table)) for name in names for table in store.tables(name)]
    columns = "dataset, backbone, modality, level, item, item_id, content_hash, n_frames, n_tokens"
    for table, width in tables:
        literals = {
            "dataset": table.dataset,
            "backbone": table.backbone,
            "modality": table.modality,
            "level": table.level,
        }
        constants = ", ".join(f"{quoted(value)} AS {key}" for key, value in literals.items())
        source = parquet_sql(table.path, "part-*.parquet")
        db.execute(
            f'CREATE OR REPLACE VIEW "{view_name(table)}" AS SELECT {columns},'
            f" embedding::FLOAT[{width}] AS embedding FROM (SELECT {constants}, * FROM {source})"
        )
    # One width in the whole warehouse: array functions work on the union too. Several widths
    # share only the list type; list_cosine_similarity works on either.
    widths = {width for _, width in tables}
    kind = f"FLOAT[{widths.pop()}]" if len(widths) == 1 else "FLOAT[]"
    union = [
        f'SELECT {columns}, embedding::{kind} AS embedding FROM "{view_name(table)}"'
        for table, _ in tables
    ]
    texts = ", ".join(
        f"NULL::VARCHAR AS {c}"
        for c in ("dataset", "backbone", "modality", "level", "item_id", "content_hash")
    )
    empty = (
        f"SELECT {columns}, embedding FROM (SELECT {texts}, NULL::INTEGER AS item,"
        " NULL::INTEGER AS n_frames, NULL::INTEGER AS n_tokens, NULL::FLOAT[] AS embedding"
        " WHERE false)"
    )
    db.execute(f"CREATE VIEW features AS {_union(union, empty)}")


def _width(table: FeatureTable) -> int:
    return int(pq.read_schema(table.parts()[0]).field("embedding").type.list_size)


def _run_views(db: duckdb.DuckDBPyConnection, warehouse: Warehouse) -> None:
    rows: list[dict[str, Any]] = []
    sources: dict[str, list[str]] = {"metrics": [], "predictions": []}
    for name in warehouse.runs():
        folder = warehouse.runs_dir / name
        row = _run_row(folder)
        rows.append(row)
        for kind, queries in sources.items():
            path = folder / f"{kind}.parquet"
            if path.exists():
                queries.append(
                    f"SELECT {quoted(name)} AS run, {quoted(row['dataset'])} AS dataset, *"
                    f" FROM {parquet_sql(folder, path.name)}"
                )
    for kind, schema in (("metrics", METRICS), ("predictions", PREDICTIONS)):
        with_dataset = pa.schema([pa.field("dataset", pa.string()), *schema])
        empty = f"SELECT * FROM {_empty(with_dataset, first='run')}"
        db.execute(f"CREATE VIEW {kind} AS {_union(sources[kind], empty)}")
    index = pa.table(
        {key: pa.array([row[key] for row in rows], pa.string()) for key in _RUN_COLUMNS}
    )
    db.register("_runs", index)
    db.execute(
        "CREATE TABLE runs AS SELECT run, dataset, model, created::TIMESTAMP AS created,"
        " seed::INTEGER AS seed, features, parameters::BIGINT AS parameters FROM _runs"
    )
    db.unregister("_runs")


def _run_row(folder: Path) -> dict[str, Any]:
    path = folder / "config.toml"
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        run = document["run"]
        return {
            "run": folder.name,
            "dataset": str(run["dataset"]),
            "model": str(run["model"]),
            "created": str(run["created"]),
            "seed": str(document["train"]["seed"]),
            "features": ", ".join(run["features"]),
            "parameters": str(run["parameters"]),
        }
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); remove the run's folder") from None
