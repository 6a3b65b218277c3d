"""Read-only SQL views over everything in a warehouse, and queries of them.

The views ``items``, ``interactions``, ``splits``, ``cold`` (held-out interactions with cold items),
``features``, ``tokens``, ``failures``, ``runs``, ``metrics`` and ``predictions`` always exist, and
are empty when nothing has been written yet. Each feature table also has a view of its own. What
cannot be shown (an unfinished table, a damaged run) is left out, and the caller is notified.
"""

import json
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from features.atomic_files import database, is_out_of_space, read_errors
from features.checksums import verify, verify_files
from features.errors import ALLOW_READING, DamagedError, NoPermissionError, UserError
from features.item_columns import PREFIX, ItemColumn, own_columns, view_columns
from features.memory import check_memory
from features.schema import FAILURES_SCHEMA, INTERACTIONS_SCHEMA, ITEMS_SCHEMA
from features.splits import cold_sql, split_sql
from features.sql_feature_views import create_feature_views
from features.sql_run_views import create_run_views
from features.sql_text import (
    empty_table,
    exact_pattern,
    parquet_sql,
    quote_identifier,
    quoted,
    union_all,
)
from features.warehouse import DatasetInfo, Warehouse

VIEWS = (
    "items", "interactions", "splits", "cold", "features", "tokens", "failures", "runs", "metrics",
    "predictions",
)  # fmt: skip
_SOURCES = {
    "items": {"items", "cold", "failures"},
    "interactions": {"interactions", "splits", "cold"},
}
"""Table of a dataset -> views that read it."""
_INEXACT_TYPE = re.compile(
    r"""(?P<name>'(?:[^']|'')*'|"(?:[^"]|"")*")"""
    r"|\b(?:DATE|(?:TIME|TIMESTAMP)(?:_S|_MS|_NS| WITH TIME ZONE)?|INTERVAL|BIT|BLOB|BIGNUM"
    r"|UHUGEINT|VARIANT)"
    r"(?=[\[\]),]|$)"
)
"""A part of DuckDB's name of a type: a type that Arrow or Python cannot hold, or a quoted name."""
MEMORY = "8GB"
"""Memory of DuckDB's own; a query that needs more writes to a temporary folder."""


def _silent(message: str) -> None:
    """Ignore a message."""


@contextmanager
def connect(
    warehouse: Warehouse,
    notify: Callable[[str], None] = _silent,
    sql: str = "",
    on_damage: Callable[[str], None] | None = None,
) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open DuckDB in memory with the views; it can read the warehouse and nothing else.

    Queries that need more memory write to a temporary folder that only this process uses.

    Args:
        warehouse: Warehouse that is shown.
        notify: Called with one line for each table or run that is left out.
        sql: Statement that will be run. The files of the views that it names are verified, and
            those whose bytes have changed are left out.
        on_damage: Called in place of ``notify`` if a file is damaged or may not be read.

    Raises:
        UserError: There is no warehouse, or its tables cannot be read.
    """

    def leave_out(error: UserError) -> None:
        is_damage = isinstance(error, (DamagedError, NoPermissionError)) and on_damage
        (on_damage if is_damage else notify)(f"left out: {error}")  # type: ignore[misc]

    warehouse.require()
    check_memory("DuckDB")
    with tempfile.TemporaryDirectory(prefix="mmrec-sql-") as spill, database() as db:
        with read_errors(warehouse.root, "run again the command that wrote it"):
            names = set(re.findall(r"\w+", sql.lower()))
            datasets = _readable_datasets(warehouse, leave_out, names)
            _create_dataset_views(db, warehouse, datasets, names)
            create_feature_views(db, warehouse, datasets, leave_out, names)
            _create_failures(db, warehouse, datasets, leave_out, names)
            create_run_views(db, warehouse, datasets, leave_out, names)
            _restrict(db, warehouse, Path(spill))
        yield db


def query(
    warehouse: Warehouse,
    sql: str,
    notify: Callable[[str], None] = _silent,
    on_damage: Callable[[str], None] | None = None,
    *,
    inexact_as_text: bool = False,
) -> pa.Table:
    """Run one reading statement over the views.

    Args:
        warehouse: Warehouse that is queried.
        sql: One SELECT, DESCRIBE or SHOW.
        notify: Called with one line for each table or run that the views leave out.
        on_damage: Called in place of ``notify`` if a file is damaged or may not be read.
        inexact_as_text: Return dates, times, intervals, bits, bytes, variants and integers of more
            than 127 bits as DuckDB prints them, also within lists and structs. Arrow and
            Python cannot hold all of their values: Python has no year 10,000 and no 24:00.

    Returns:
        The result. A repeated column name gets a number: ``a``, ``a_1``.

    Raises:
        DamagedError: The bytes of a file that the statement reads by its path have changed.
        UserError: The statement cannot be parsed, would write, or fails.

    Examples:
        >>> from features.warehouse import Warehouse
        >>> table = query(Warehouse("warehouse"), "SELECT * FROM runs")  # doctest: +SKIP
    """
    try:
        sql.encode()
    except UnicodeEncodeError:
        raise UserError("the SQL is not UTF-8; write it in a terminal that is") from None
    with connect(warehouse, notify, sql, on_damage) as db:
        try:
            result = _select(db, sql, inexact_as_text)
        except duckdb.Error as error:
            _verify_opened_files(db, warehouse.root)  # the damage of a file can be the cause
            raise _query_error(error, _column_hint(db, str(error))) from None
        _verify_opened_files(db, warehouse.root)
        return result


def _select(db: duckdb.DuckDBPyConnection, sql: str, inexact_as_text: bool) -> pa.Table:
    """Run one reading statement."""
    statements = db.extract_statements(sql)
    if len(statements) != 1:
        raise UserError(f"give one SQL statement, not {len(statements)}")
    if statements[0].type != duckdb.StatementType.SELECT:
        kind = statements[0].type.name
        raise UserError(f"mmrec sql runs a SELECT, DESCRIBE or SHOW, not {kind}")
    # A WITH with a COPY or DELETE in it counts as a SELECT. As a subquery, it is refused.
    inner = _without_end(statements[0].query)
    columns = db.execute(f"DESCRIBE SELECT * FROM (\n{inner}\n)").fetchall()
    types = [column[1] for column in columns]
    text_types = [_INEXACT_TYPE.sub(lambda match: match["name"] or "VARCHAR", k) for k in types]
    is_cast = inexact_as_text and text_types != types
    if is_cast:
        casts = ", ".join(f"#{number}::{kind}" for number, kind in enumerate(text_types, 1))
        inner = f"SELECT {casts} FROM (\n{inner}\n)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one more copy, but db.sql() cannot be interrupted
        result = db.execute(inner).to_arrow_table()
    assert isinstance(result, pa.Table)
    names = [column[0] for column in columns] if is_cast else result.column_names
    return result.rename_columns(_distinct(names))


def _verify_opened_files(db: duckdb.DuckDBPyConnection, root: Path) -> None:
    """Check the files of the warehouse that the connection has opened since it was restricted.

    Raises:
        DamagedError: The bytes of a file have changed since it was written.
    """
    messages = db.execute("SELECT message FROM duckdb_logs WHERE type = 'FileSystem'").fetchall()
    paths = {Path(json.loads(message)["path"]).absolute() for (message,) in messages}
    for path in sorted(paths):
        if path.is_relative_to(root.absolute()) and path.is_file():
            with read_errors(path, "run again the command that wrote it"):
                verify(path)


def _column_hint(db: duckdb.DuckDBPyConnection, message: str) -> str:
    """Return a hint for an own column of items that has another name in the view, else nothing."""
    match = re.search(r'column "(.+)" not found', message)
    if match is None:
        return ""
    columns = {row[0].lower(): row[0] for row in db.execute("DESCRIBE items").fetchall()}
    name = columns.get(f"{PREFIX}{match[1]}".lower())
    return f"; its types differ between datasets, so it is {quote_identifier(name)}" if name else ""


def _query_error(error: duckdb.Error, column_hint: str) -> UserError:
    """Return the error of a query as one line with a remedy."""
    line = " ".join(str(error).split("\n\n")[0].split())
    if is_out_of_space(error):
        remedy = f"; the query may use {MEMORY} of memory, and the disk of {tempfile.gettempdir()}"
        return UserError(f"SQL: {line[:200]}{remedy}; select fewer rows or columns, or free space")
    if "Permission denied" in line:
        return UserError(f"SQL: {line}; {ALLOW_READING}")
    hint = f"; the views are {', '.join(VIEWS)}" if "does not exist" in line else ""
    return UserError(f"SQL: {line}{hint}{column_hint}")


def _readable_datasets(
    warehouse: Warehouse, leave_out: Callable[[UserError], None], names: Set[str]
) -> dict[str, DatasetInfo]:
    """Return the prepared datasets whose files can be read."""
    is_read = {table: not names.isdisjoint(views) for table, views in _SOURCES.items()}
    datasets: dict[str, DatasetInfo] = {}
    for name in warehouse.datasets():
        try:
            info = warehouse.info(name)
            for table in ("items", "interactions"):
                remedy = f"mmrec prepare --dataset {name}"
                recorded = info.checksums.get(table, {})
                _check_files(warehouse.dataset_dir(name) / table, remedy, recorded, is_read[table])
            datasets[name] = info
        except UserError as error:
            leave_out(error)
    return datasets


def _create_dataset_views(
    db: duckdb.DuckDBPyConnection,
    warehouse: Warehouse,
    datasets: Mapping[str, DatasetInfo],
    views_read: Set[str],
) -> None:
    """Create ``items``, ``interactions``, ``splits`` and ``cold``."""
    queries: dict[str, list[str]] = {"items": [], "interactions": [], "splits": [], "cold": []}
    own = _own_columns(db, warehouse, datasets, "items" in views_read)
    for name in datasets:
        folder = warehouse.dataset_dir(name)
        items, interactions = parquet_sql(folder / "items"), parquet_sql(folder / "interactions")
        values = "".join(
            f", {column.value_sql(name)} AS {quote_identifier(column.name)}"
            for column in own
            if name in column.keys
        )
        sources = {
            "items": f"(SELECT *{values} FROM {items})",
            "interactions": interactions,
            "splits": f"({split_sql(interactions, datasets[name].dates)})",
            "cold": f"({cold_sql(interactions, items, datasets[name].dates)})",
        }
        for view, source in sources.items():
            queries[view].append(f"SELECT {quoted(name)} AS dataset, * FROM {source}")
    split = f"(SELECT *, '' AS split FROM {_empty_with_dataset(INTERACTIONS_SCHEMA)})"
    views = {
        "items": ("*", _empty_with_dataset(ITEMS_SCHEMA)),
        "interactions": ("*", _empty_with_dataset(INTERACTIONS_SCHEMA)),
        "splits": ("dataset, user, user_id, item, timestamp, position, split", split),
        "cold": ("dataset, user, item, position, split", split),
    }
    for view, (columns, empty) in views.items():
        union = union_all(queries[view], f"SELECT {columns} FROM {empty}")
        db.execute(f"CREATE VIEW {view} AS SELECT {columns} FROM ({union})")


def _own_columns(
    db: duckdb.DuckDBPyConnection,
    warehouse: Warehouse,
    datasets: Mapping[str, DatasetInfo],
    is_read: bool,
) -> list[ItemColumn]:
    """Return the own columns of items in the view ``items``; none if no statement reads it."""
    if not is_read:
        return []
    columns = {
        name: own_columns(db, f"SELECT attributes FROM {parquet_sql(path)}")
        if info.item_columns is None
        else info.item_columns
        for name, info in datasets.items()
        if (path := warehouse.dataset_dir(name) / "items")
    }
    return view_columns(columns, {"dataset", *ITEMS_SCHEMA.names})


def _create_failures(
    db: duckdb.DuckDBPyConnection,
    warehouse: Warehouse,
    names: Iterable[str],
    leave_out: Callable[[UserError], None],
    views: Set[str],
) -> None:
    """Create ``failures``, with today's item indices: a preparation changes them, not the ids."""
    columns = ", ".join(f"f.{name}" for name in FAILURES_SCHEMA.names if name != "item")
    queries = [
        f"SELECT i.dataset, i.item, {columns}"
        f" FROM {parquet_sql(warehouse.dataset_dir(name) / 'failures')} f"
        f" JOIN items i ON i.dataset = {quoted(name)} AND i.item_id = f.item_id"
        for name in names
        if _has_failures(warehouse, name, leave_out, "failures" in views)
    ]
    empty = f"SELECT * FROM {_empty_with_dataset(FAILURES_SCHEMA)}"
    db.execute(f"CREATE VIEW failures AS {union_all(queries, empty)}")


def _restrict(db: duckdb.DuckDBPyConnection, warehouse: Warehouse, spill: Path) -> None:
    """Limit the connection to reading the warehouse, and its memory.

    Args:
        db: The connection.
        warehouse: Warehouse that it may read.
        spill: Folder to which queries write what does not fit into memory.
    """
    # Access is checked with the pattern of the files, so the pattern of the root is allowed too.
    roots = (str(warehouse.root), exact_pattern(warehouse.root))
    db.execute(f"SET allowed_directories = [{', '.join(map(quoted, roots))}]")
    db.execute(f"SET memory_limit = '{MEMORY}'")
    db.execute(f"SET temp_directory = {quoted(str(spill))}")
    # A statement can compose the path of a file that it reads. The log names every opened file.
    db.execute("CALL enable_logging('FileSystem')")
    db.execute("SET enable_external_access = false")
    db.execute("SET lock_configuration = true")


def _empty_with_dataset(schema: pa.Schema) -> str:
    return empty_table(pa.schema([pa.field("dataset", pa.string()), *schema]))


def _check_files(
    folder: Path, remedy: str, recorded: Mapping[str, str | None], is_read: bool
) -> None:
    """Read the footer of every file of a table, and all of it if the statement reads the table.

    Args:
        folder: Folder of the table.
        remedy: Command that writes the table.
        recorded: As for :func:`features.checksums.verify_files`.
        is_read: The statement reads the table.

    Raises:
        DamagedError: A file is damaged, or the table has none.
    """
    paths = sorted(folder.glob("*.parquet"))
    if not paths:
        raise DamagedError(f"{folder} holds no table; run: {remedy}")
    for path in paths:
        with read_errors(path, f"run: {remedy}"):
            if is_read:
                verify_files([path], recorded)
            pq.read_schema(path)


def _has_failures(
    warehouse: Warehouse, name: str, leave_out: Callable[[UserError], None], is_read: bool
) -> bool:
    """Return whether a dataset has a table of failures that can be read."""
    folder = warehouse.dataset_dir(name) / "failures"
    if not any(folder.glob("*.parquet")):
        return False
    try:
        _check_files(folder, f"mmrec extract --dataset {name}", {}, is_read)
    except UserError as error:
        leave_out(error)
        return False
    return True


def _without_end(statement: str) -> str:
    """Return one statement without its semicolon and the comments after it."""
    data = statement.encode()
    for place, kind in duckdb.tokenize(statement):
        if kind == duckdb.token_type.operator and data[place : place + 1] == b";":
            return data[:place].decode()
    return statement


def _distinct(names: list[str]) -> list[str]:
    """Return column names of which none repeats; later ones get a number."""
    taken, distinct = set(names), []
    for index, name in enumerate(names):
        fresh, number = name, 0
        while name in names[:index] and fresh in taken:
            number += 1
            fresh = f"{name}_{number}"
        taken.add(fresh)
        distinct.append(fresh)
    return distinct
