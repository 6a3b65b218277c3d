"""The result tables of a run: ``metrics.parquet`` and ``predictions.parquet``.

Version 0.1 called the ranking without seen items ``masked`` and the one with them ``unmasked``.
Its files are read as if they had today's names, ``filtered`` and ``kept``.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.atomic_files import read_table
from features.schema import METRICS_SCHEMA, PREDICTIONS_SCHEMA
from features.sql_text import parquet_sql, quoted

SEEN_OF_0_1 = {"masked": "filtered", "unmasked": "kept"}
"""Values of ``seen`` in metrics of version 0.1, and today's."""
RANKS_OF_0_1 = {"rank_masked": "rank_filtered", "rank_unmasked": "rank_kept"}
"""Columns of predictions of version 0.1, and today's."""

PROTOCOL_KEY = "protocol"
"""Key of the version of the evaluation protocol in the file metadata of predictions."""


def read_metrics_table(path: Path) -> pa.Table:
    """Read a run's metrics table, of this version or of version 0.1.

    Returns:
        A table with METRICS_SCHEMA.

    Raises:
        OSError, pyarrow.ArrowException: The file cannot be read.
        ValueError: The file has other columns.
    """
    table = _checked(read_table(path), METRICS_SCHEMA)
    column = table.schema.get_field_index("seen")
    seen = table["seen"]
    for old, new in SEEN_OF_0_1.items():
        seen = pc.if_else(pc.equal(seen, old), new, seen)
    return table.set_column(column, METRICS_SCHEMA.field("seen"), seen)


def read_predictions_table(path: Path) -> pa.Table:
    """Read a run's predictions, of this version or of version 0.1.

    Returns:
        A table with PREDICTIONS_SCHEMA.

    Raises:
        OSError, pyarrow.ArrowException: The file cannot be read.
        ValueError: The file has other columns.
    """
    table = read_table(path)
    names = [RANKS_OF_0_1.get(name, name) for name in table.column_names]
    return _checked(table.rename_columns(names), PREDICTIONS_SCHEMA)


def read_protocol(path: Path) -> str | None:
    """Return the version of the evaluation protocol of a run's predictions.

    Returns:
        The version; "" for predictions of versions of mmrec that stored none; ``None`` if the file
        is absent or damaged.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException):
        return None
    return str(metadata.get(PROTOCOL_KEY.encode(), b"").decode())


def metrics_sql(folder: Path) -> str:
    """Return a SELECT over ``metrics.parquet``, as `read_metrics_table` reads it.

    Raises:
        OSError, pyarrow.ArrowException: The file cannot be read.
        ValueError: The file has other columns.
    """
    _check_names(pq.read_schema(folder / "metrics.parquet").names, METRICS_SCHEMA)
    cases = " ".join(f"WHEN {quoted(old)} THEN {quoted(new)}" for old, new in SEEN_OF_0_1.items())
    source = parquet_sql(folder, "metrics.parquet")
    return f"SELECT * REPLACE (CASE seen {cases} ELSE seen END AS seen) FROM {source}"


def predictions_sql(folder: Path) -> str:
    """Return a SELECT over ``predictions.parquet``, as `read_predictions_table` reads it.

    Raises:
        OSError, pyarrow.ArrowException: The file cannot be read.
        ValueError: The file has other columns.
    """
    names = pq.read_schema(folder / "predictions.parquet").names
    _check_names([RANKS_OF_0_1.get(name, name) for name in names], PREDICTIONS_SCHEMA)
    columns = ", ".join(
        f"{name} AS {RANKS_OF_0_1[name]}" if name in RANKS_OF_0_1 else name for name in names
    )
    return f"SELECT {columns} FROM {parquet_sql(folder, 'predictions.parquet')}"


def _checked(table: pa.Table, schema: pa.Schema) -> pa.Table:
    _check_names(table.column_names, schema)
    if table.schema.types == schema.types:  # filtered ranks were never NULL in earlier versions
        table = table.cast(schema)
    if not table.schema.equals(schema):
        raise ValueError(f"its types are {', '.join(map(str, table.schema.types))}")
    return table


def _check_names(names: list[str], schema: pa.Schema) -> None:
    if names != schema.names:
        raise ValueError(f"its columns are {', '.join(names) or 'none'}")
