"""Pieces of SQL text: quoted strings, Parquet files as tables, empty tables, unions."""

import re
from pathlib import Path

import pyarrow as pa

_SQL_TYPES = {
    "int32": "INTEGER", "int64": "BIGINT", "string": "VARCHAR", "double": "DOUBLE",
    "bool": "BOOLEAN",
}  # fmt: skip


def parquet_sql(folder: Path, pattern: str = "*.parquet") -> str:
    """Return SQL that reads the Parquet files of a folder, whose path may have any character."""
    # A folder named item=7 in the path must not become a column.
    files = quoted(f"{exact_pattern(folder)}/{pattern}")
    return f"read_parquet({files}, hive_partitioning = false)"


def exact_pattern(folder: Path) -> str:
    """Return the pattern that matches this folder only: its path may hold ``*``, ``?``, ``[``."""
    return re.sub(r"([*?\[])", r"[\1]", str(folder))


def quoted(text: str) -> str:
    """Quote a string for SQL."""
    return "'" + text.replace("'", "''") + "'"


def quote_identifier(name: str) -> str:
    """Quote the name of a column for SQL."""
    return '"' + name.replace('"', '""') + '"'


def pointer_sql(key: str) -> str:
    """Return the JSON pointer of a key of an object as an SQL string; the key may be any text.

    A path such as ``$.key`` has wildcards and refuses the empty key; a pointer (RFC 6901) does not.
    """
    return quoted("/" + key.replace("~", "~0").replace("/", "~1"))


def empty_table(schema: pa.Schema) -> str:
    """Return a subquery with the columns of a schema and no row."""
    columns = [f"NULL::{_SQL_TYPES[str(field.type)]} AS {field.name}" for field in schema]
    return f"(SELECT {', '.join(columns)} WHERE false)"


def union_all(queries: list[str], empty: str) -> str:
    """Return the union of queries by the names of their columns, or ``empty`` if there is none."""
    return " UNION ALL BY NAME ".join(f"({query})" for query in queries) if queries else empty
