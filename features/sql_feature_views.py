"""SQL views of the feature tables: one for each table, and their unions.

``features`` is the union of the pooled tables, ``tokens`` that of the token tables without their
embeddings. The view of one table is ``features_<dataset>_<backbone>_<modality>``; its embedding is
``FLOAT[D]``.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

import duckdb
import pyarrow.parquet as pq

from features.errors import DamagedError, NoPermissionError, UserError
from features.provenance import OPTIONAL_COLUMN, SMALL_COLUMNS, read_provenance
from features.sql_text import parquet_sql, quoted, union_all
from features.store import FeatureStore, FeatureTable
from features.warehouse import DatasetInfo, Warehouse

_COLUMNS = "dataset, backbone, modality, level, " + ", ".join(SMALL_COLUMNS)
_TEXTS = ("dataset", "backbone", "modality", "level", "item_id", "content_hash")
_INTEGERS = ("item", "n_frames", "n_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class _TableView:
    """The view of one complete feature table."""

    table: FeatureTable
    name: str
    dim: int
    """Width D of the embedding."""


def view_name(table: FeatureTable) -> str:
    """Return the name of a table's view, such as ``features_demo_hashed_image``."""
    parts = [table.dataset, table.backbone, table.modality]
    if table.level != "pooled":
        parts.append(table.level)
    return re.sub(r"\W+", "_", "features_" + "_".join(parts)).lower()


def create_feature_views(
    db: duckdb.DuckDBPyConnection,
    warehouse: Warehouse,
    datasets: Mapping[str, DatasetInfo],
    leave_out: Callable[[UserError], None],
    names: Set[str] = frozenset(),
) -> None:
    """Create the views of the complete feature tables, ``features`` and ``tokens``.

    Args:
        db: Connection that gets the views.
        warehouse: Warehouse with the tables.
        datasets: Datasets whose tables are shown.
        leave_out: Called with the reason for each table that is left out: those that are damaged,
            and of the unfinished ones those that the statement reads.
        names: Names in the statement that will be run. Tables that it reads are verified.
    """
    views = _complete_tables(warehouse, datasets, leave_out, names)
    for view in views:
        db.execute(_table_view_sql(view))
    empty = (
        f"SELECT {_COLUMNS}, embedding FROM (SELECT "
        + "".join(f"NULL::VARCHAR AS {name}, " for name in _TEXTS)
        + "".join(f"NULL::INTEGER AS {name}, " for name in _INTEGERS)
        + "NULL::BOOLEAN AS partial, NULL::FLOAT[] AS embedding WHERE false)"
    )
    pooled = [view for view in views if view.table.level == "pooled"]
    # With one width in the whole warehouse, array functions work on the union as well. Several
    # widths have only the list type in common; list_cosine_similarity works on both types.
    widths = {view.dim for view in pooled}
    kind = f"FLOAT[{widths.pop()}]" if len(widths) == 1 else "FLOAT[]"
    queries = [
        f'SELECT {_COLUMNS}, embedding::{kind} AS embedding FROM "{view.name}"' for view in pooled
    ]
    db.execute(f"CREATE VIEW features AS {union_all(queries, empty)}")
    queries = [
        f'SELECT {_COLUMNS}, dim FROM "{view.name}"'
        for view in views
        if view.table.level != "pooled"
    ]
    empty = f"SELECT {_COLUMNS}, n_tokens AS dim FROM ({empty})"
    db.execute(f"CREATE VIEW tokens AS {union_all(queries, empty)}")


def _complete_tables(
    warehouse: Warehouse,
    datasets: Mapping[str, DatasetInfo],
    leave_out: Callable[[UserError], None],
    names: Set[str],
) -> list[_TableView]:
    """Return the tables that can be shown, each with a name of its own."""
    store = FeatureStore(warehouse)
    tables: list[tuple[FeatureTable, int]] = []
    for name, info in datasets.items():
        for table in store.tables(name):
            union = "features" if table.level == "pooled" else "tokens"
            # A view that shares its name with another has a suffix.
            own = view_name(table)
            is_read = union in names or any(word.startswith(own) for word in names)
            try:
                manifest = table.check(info.fingerprint, info.inputs_of(table.modality))
                if is_read:
                    table.verify(manifest)
                tables.append((table, read_provenance(table.parts()[0]).dim))
            except UserError as error:
                if is_read or isinstance(error, (DamagedError, NoPermissionError)):
                    leave_out(error)
    counts = Counter(view_name(table) for table, _ in tables)
    return [
        _TableView(
            table=table,
            name=view_name(table) + (_tag(table) if counts[view_name(table)] > 1 else ""),
            dim=dim,
        )
        for table, dim in tables
    ]


def _table_view_sql(view: _TableView) -> str:
    """Return the statement that creates the view of one table."""
    table = view.table
    is_pooled = table.level == "pooled"
    literals = {
        "dataset": table.dataset,
        "backbone": table.backbone,
        "modality": table.modality,
        "level": table.level,
    }
    constants = ", ".join(f"{quoted(value)} AS {key}" for key, value in literals.items())
    if not is_pooled:
        constants += f", {view.dim} AS dim"
    if OPTIONAL_COLUMN not in pq.read_schema(table.parts()[0]).names:
        constants += f", NULL::BOOLEAN AS {OPTIONAL_COLUMN}"
    columns = f"{_COLUMNS}, " if is_pooled else f"{_COLUMNS}, dim, "
    kind = f"FLOAT[{view.dim}]" if is_pooled else "FLOAT[]"
    source = parquet_sql(table.path, "part-*.parquet")
    return (
        f'CREATE VIEW "{view.name}" AS SELECT {columns}embedding::{kind} AS embedding'
        f" FROM (SELECT {constants}, * FROM {source})"
    )


def _tag(table: FeatureTable) -> str:
    """Return a suffix for tables whose names differ only in a capital or a special character."""
    exact = "/".join((table.dataset, table.backbone, table.modality, table.level))
    return "_" + hashlib.sha256(exact.encode()).hexdigest()[:4]
