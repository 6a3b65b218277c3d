"""The SQL side: read-only views over everything in a warehouse.

``items``, ``interactions``, ``splits``, ``cold`` (held-out interactions with cold items),
``features``, ``failures``, ``runs``, ``metrics`` and ``predictions`` are always there, empty when
nothing has been written yet. Each feature table also
has a view of its own, ``features_<dataset>_<backbone>_<modality>``, whose embedding is always
``FLOAT[D]``. What cannot be shown (an unfinished table, a damaged run) is left out and said.
"""

import hashlib
import re
import tempfile
import tomllib
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from features.atomic_files import read_errors
from features.dataset import exact_pattern, parquet_sql, quoted
from features.errors import UserError
from features.provenance import OPTIONAL_COLUMN, SMALL_COLUMNS, read_provenance
from features.result_tables import metrics_sql, predictions_sql
from features.schema import (
    FAILURES_SCHEMA,
    INTERACTIONS_SCHEMA,
    ITEMS_SCHEMA,
    METRICS_SCHEMA,
    PREDICTIONS_SCHEMA,
)
from features.splits import cold_sql, split_sql
from features.store import FeatureStore, FeatureTable
from features.warehouse import DatasetInfo, Warehouse

VIEWS = (
    "items", "interactions", "splits", "cold", "features", "tokens", "failures", "runs", "metrics",
    "predictions",
)  # fmt: skip
MEMORY = "8GB"  # of DuckDB's own; beyond it, it spills
_RESULTS = {"metrics": metrics_sql, "predictions": predictions_sql}
_RUN_COLUMNS = ("run", "dataset", "model", "created", "seed", "features", "parameters")


def _silent(message: str) -> None:
    """Say nothing."""


def connect(
    warehouse: Warehouse, notify: Callable[[str], None] = _silent
) -> duckdb.DuckDBPyConnection:
    """Open DuckDB in memory with the views; it can read the warehouse and nothing else.

    Args:
        warehouse: What is shown.
        notify: Told in one line of each thing that is left out, and why.

    Raises:
        UserError: There is no warehouse, or its tables cannot be read.
    """
    warehouse.require()
    db = duckdb.connect()
    try:
        db.execute("SET enable_progress_bar = false")  # it goes among the results
        with read_errors(warehouse.root, "run again the command that wrote it"):
            _views(db, warehouse, notify)
    except BaseException:
        db.close()
        raise
    return db


def _views(
    db: duckdb.DuckDBPyConnection, warehouse: Warehouse, notify: Callable[[str], None]
) -> None:
    datasets: dict[str, DatasetInfo] = {}
    for name in warehouse.datasets():
        try:
            info = warehouse.info(name)
            for table in ("items", "interactions"):
                _check_files(warehouse.dataset_dir(name) / table, f"mmrec prepare --dataset {name}")
            datasets[name] = info
        except UserError as error:
            notify(f"left out: {error}")
    _view(db, "items", [_of(warehouse, name, "items") for name in datasets], ITEMS_SCHEMA)
    _view(
        db,
        "interactions",
        [_of(warehouse, name, "interactions") for name in datasets],
        INTERACTIONS_SCHEMA,
    )
    split = [_split_of(warehouse, name) for name in datasets]
    columns = "dataset, user, user_id, item, timestamp, position, split"
    empty = f"SELECT * FROM (SELECT *, '' AS split FROM {_empty(INTERACTIONS_SCHEMA)})"
    db.execute(f"CREATE VIEW splits AS SELECT {columns} FROM ({_union(split, empty)})")
    cold = [_cold_of(warehouse, name) for name in datasets]
    columns = "dataset, user, item, position, split"
    empty = f"SELECT {columns} FROM (SELECT *, '' AS split FROM {_empty(INTERACTIONS_SCHEMA)})"
    db.execute(f"CREATE VIEW cold AS SELECT {columns} FROM ({_union(cold, empty)})")
    _feature_views(db, warehouse, datasets, notify)
    # The index of an item changes with a preparation, its id does not.
    columns = ", ".join(f"f.{name}" for name in FAILURES_SCHEMA.names if name != "item")
    broken = [name for name in datasets if not _has_failures(warehouse, name, notify)]
    failed = [
        f"SELECT i.dataset, i.item, {columns} FROM ({_of(warehouse, name, 'failures')}) f"
        f" JOIN items i ON i.dataset = {quoted(name)} AND i.item_id = f.item_id"
        for name in datasets
        if name not in broken
    ]
    _view(db, "failures", failed, FAILURES_SCHEMA)
    _run_views(db, warehouse, datasets, notify)
    # Files are checked by the pattern that names them, hence the pattern of the root beside it.
    roots = (str(warehouse.root), exact_pattern(warehouse.root))
    db.execute(f"SET allowed_directories = [{', '.join(map(quoted, roots))}]")
    db.execute(f"SET memory_limit = '{MEMORY}'")
    spill = Path(tempfile.gettempdir()) / "mmrec-sql"
    db.execute(f"SET temp_directory = {quoted(str(spill))}")
    db.execute("SET enable_external_access = false")
    db.execute("SET lock_configuration = true")


def query(warehouse: Warehouse, sql: str, notify: Callable[[str], None] = _silent) -> pa.Table:
    """Run one reading statement over the views.

    Args:
        warehouse: What is asked.
        sql: One SELECT, DESCRIBE or SHOW.
        notify: Told of what the views leave out.

    Returns:
        The answer; a column name that came twice has a number in its later places.

    Raises:
        UserError: The statement cannot be parsed, would write, or fails.
    """
    db = connect(warehouse, notify)
    try:
        try:
            sql.encode()
        except UnicodeEncodeError:
            raise UserError("the SQL is not UTF-8; write it in a terminal that is") from None
        statements = db.extract_statements(sql)
        if len(statements) != 1:
            raise UserError(f"give one SQL statement, not {len(statements)}")
        if statements[0].type != duckdb.StatementType.SELECT:
            kind = statements[0].type.name
            raise UserError(f"mmrec sql runs a SELECT, DESCRIBE or SHOW, not {kind}")
        # A WITH may hold a COPY or DELETE and still be called a SELECT; nested, it is refused.
        inner = _without_end(statements[0].query)
        db.execute(f"EXPLAIN SELECT * FROM (\n{inner}\n)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one more copy, but db.sql() cannot be interrupted
            result = db.execute(inner).to_arrow_table()
        assert isinstance(result, pa.Table)
        return result.rename_columns(_distinct(result.column_names))
    except duckdb.Error as error:
        line = re.sub(r"\s+", " ", str(error).split("\n\n")[0]).strip()
        hint = f"; the views are {', '.join(VIEWS)}" if "does not exist" in line else ""
        raise UserError(f"SQL: {line}{hint}") from None
    finally:
        db.close()


def _without_end(statement: str) -> str:
    """Cut one statement off at its semicolon, behind which there may be remarks."""
    data = statement.encode()
    for place, kind in duckdb.tokenize(statement):
        if kind == duckdb.token_type.operator and data[place : place + 1] == b";":
            return data[:place].decode()
    return statement


def _distinct(names: list[str]) -> list[str]:
    taken, found = set(names), []
    for index, name in enumerate(names):
        fresh, number = name, 0
        while name in names[:index] and fresh in taken:
            number += 1
            fresh = f"{name}_{number}"
        taken.add(fresh)
        found.append(fresh)
    return found


def _of(warehouse: Warehouse, dataset: str, table: str) -> str:
    source = parquet_sql(warehouse.dataset_dir(dataset) / table)
    return f"SELECT {quoted(dataset)} AS dataset, * FROM {source}"


def _split_of(warehouse: Warehouse, dataset: str) -> str:
    source = parquet_sql(warehouse.dataset_dir(dataset) / "interactions")
    return f"SELECT {quoted(dataset)} AS dataset, * FROM ({split_sql(source)})"


def _cold_of(warehouse: Warehouse, dataset: str) -> str:
    folder = warehouse.dataset_dir(dataset)
    interactions, items = parquet_sql(folder / "interactions"), parquet_sql(folder / "items")
    return f"SELECT {quoted(dataset)} AS dataset, * FROM ({cold_sql(interactions, items)})"


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


def _feature_views(
    db: duckdb.DuckDBPyConnection,
    warehouse: Warehouse,
    datasets: dict[str, DatasetInfo],
    notify: Callable[[str], None],
) -> None:
    store = FeatureStore(warehouse)
    tables: list[tuple[FeatureTable, int]] = []
    for name, info in datasets.items():
        for table in store.tables(name):
            try:
                table.check(info.fingerprint, info.inputs_of(table.modality))
                tables.append((table, read_provenance(table.parts()[0]).dim))
            except UserError as error:
                notify(f"left out: {error}")
    plain = Counter(view_name(table) for table, _ in tables)
    names = {
        table.path: view_name(table) + (_tag(table) if plain[view_name(table)] > 1 else "")
        for table, _ in tables
    }
    columns = "dataset, backbone, modality, level, " + ", ".join(SMALL_COLUMNS)
    kinds = {table.path: f"FLOAT[{width}]" for table, width in tables}
    kinds |= {table.path: "FLOAT[]" for table, _ in tables if table.level != "pooled"}
    for table, width in tables:
        literals = {
            "dataset": table.dataset,
            "backbone": table.backbone,
            "modality": table.modality,
            "level": table.level,
        }
        constants = ", ".join(f"{quoted(value)} AS {key}" for key, value in literals.items())
        if table.level != "pooled":
            constants += f", {width} AS dim"
        if OPTIONAL_COLUMN not in pq.read_schema(table.parts()[0]).names:
            constants += f", NULL::BOOLEAN AS {OPTIONAL_COLUMN}"
        source = parquet_sql(table.path, "part-*.parquet")
        db.execute(
            f'CREATE VIEW "{names[table.path]}" AS SELECT {columns},'
            f" {'' if table.level == 'pooled' else 'dim, '}embedding::{kinds[table.path]} AS"
            f" embedding FROM (SELECT {constants}, * FROM {source})"
        )
    pooled = [(table, width) for table, width in tables if table.level == "pooled"]
    # One width in the whole warehouse: array functions work on the union too. Several widths
    # share only the list type; list_cosine_similarity works on either.
    widths = {width for _, width in pooled}
    kind = f"FLOAT[{widths.pop()}]" if len(widths) == 1 else "FLOAT[]"
    union = [
        f'SELECT {columns}, embedding::{kind} AS embedding FROM "{names[table.path]}"'
        for table, _ in pooled
    ]
    tokens = [
        f'SELECT {columns}, dim FROM "{names[table.path]}"'
        for table, _ in tables
        if table.level != "pooled"
    ]
    texts = ", ".join(
        f"NULL::VARCHAR AS {c}"
        for c in ("dataset", "backbone", "modality", "level", "item_id", "content_hash")
    )
    empty = (
        f"SELECT {columns}, embedding FROM (SELECT {texts}, NULL::INTEGER AS item,"
        " NULL::INTEGER AS n_frames, NULL::INTEGER AS n_tokens, NULL::BOOLEAN AS partial,"
        " NULL::FLOAT[] AS embedding"
        " WHERE false)"
    )
    db.execute(f"CREATE VIEW features AS {_union(union, empty)}")
    empty = f"SELECT {columns}, n_tokens AS dim FROM ({empty})"
    db.execute(f"CREATE VIEW tokens AS {_union(tokens, empty)}")


def _tag(table: FeatureTable) -> str:
    """What tells my-model from my_model, and Shop from shop."""
    exact = "/".join((table.dataset, table.backbone, table.modality, table.level))
    return "_" + hashlib.sha256(exact.encode()).hexdigest()[:4]


def _run_views(
    db: duckdb.DuckDBPyConnection,
    warehouse: Warehouse,
    datasets: dict[str, DatasetInfo],
    notify: Callable[[str], None],
) -> None:
    rows: list[dict[str, Any]] = []
    order = {name: info.fingerprint for name, info in datasets.items()}
    schemas = {"metrics": METRICS_SCHEMA, "predictions": PREDICTIONS_SCHEMA}
    sources: dict[str, list[str]] = {kind: [] for kind in schemas}
    for folder in warehouse.no_runs():
        notify(f"left out: {folder}, which has no config.toml: it was killed when it began")
    for name in warehouse.runs():
        folder = warehouse.runs_dir / name
        try:
            row = _run_row(folder)
            selects = {}
            for kind, select in _RESULTS.items():
                path = folder / f"{kind}.parquet"
                if path.exists():
                    with read_errors(path, "evaluate the run again"):
                        selects[kind] = select(folder)
        except UserError as error:
            notify(f"left out: {error}")
            continue
        rows.append(row)
        if order.get(row["dataset"], "") != row["fingerprint"] and "predictions" in selects:
            del selects["predictions"]
            notify(
                f"left out: the predictions of {name}, whose items are those of another"
                f" preparation of {row['dataset']}; train again"
            )
        columns = f"{quoted(name)} AS run, {quoted(row['dataset'])} AS dataset, *"
        for kind, source in selects.items():
            sources[kind].append(f"SELECT {columns} FROM ({source})")
    for kind, schema in schemas.items():
        with_dataset = pa.schema([pa.field("dataset", pa.string()), *schema])
        empty = f"SELECT * FROM {_empty(with_dataset, first='run')}"
        db.execute(f"CREATE VIEW {kind} AS {_union(sources[kind], empty)}")
    index = pa.table(
        {key: pa.array([row[key] for row in rows], pa.string()) for key in _RUN_COLUMNS}
    )
    db.register("_runs", index)
    db.execute(
        "CREATE TABLE runs AS SELECT run, dataset, model, created::TIMESTAMP AS created,"
        " seed::BIGINT AS seed, features, parameters::BIGINT AS parameters FROM _runs"
    )
    db.unregister("_runs")


def _check_files(folder: Path, remedy: str) -> None:
    """Look at the footer of every file of a table.

    Raises:
        UserError: One is damaged, or there is none.
    """
    paths = sorted(folder.glob("*.parquet"))
    if not paths:
        raise UserError(f"{folder} holds no table; run: {remedy}")
    for path in paths:
        with read_errors(path, f"run: {remedy}"):
            pq.read_schema(path)


def _has_failures(warehouse: Warehouse, name: str, notify: Callable[[str], None]) -> bool:
    folder = warehouse.dataset_dir(name) / "failures"
    if not any(folder.glob("*.parquet")):
        return False
    try:
        _check_files(folder, f"mmrec extract --dataset {name}")
    except UserError as error:
        notify(f"left out: {error}")
        return False
    return True


def _run_row(folder: Path) -> dict[str, Any]:
    path = folder / "config.toml"
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
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
        }
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); remove the run's folder") from None
