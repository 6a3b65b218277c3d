"""From the two raw tables to the canonical ones, in DuckDB SQL: k-core, order, dense indices.

The steps are called one after another on one connection, each leaving its tables to the next.
Exact duplicates of an interaction (same user, item and time) are kept, as in the published 5-core
sets, and counted among the remarks.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from features.atomic_files import atomic_write
from features.errors import UserError
from features.schema import INTERACTIONS_SCHEMA, ITEMS_SCHEMA, MODALITIES
from features.warehouse import DatasetInfo
from pipeline.datasets.importers.base import Files, many, some
from pipeline.datasets.importers.raw_sql import one

UNLISTED = ("refuse", "keep", "drop")
ROW_GROUP = 131_072


def settle_unlisted(
    db: duckdb.DuckDBPyConnection,
    choice: str,
    files: Files,
    notify: Callable[[str], None],
) -> None:
    """Settle interactions whose item is not listed."""
    db.execute(
        "CREATE TABLE unlisted AS SELECT item_id, count(*) AS n FROM raw_interactions"
        " ANTI JOIN raw_items USING (item_id) GROUP BY item_id"
    )
    items, rows, such = one(
        db, "SELECT count(*), sum(n), list(item_id ORDER BY item_id)[:3] FROM unlisted"
    )
    if not items:
        return
    what = f"{many(items, 'item')} of {many(rows, 'interaction')} (such as {some(such)}) not listed"
    if choice == "refuse":
        listing = files["items"][0]
        raise UserError(
            f"{what} in {listing}; add them, or give --unlisted keep (without text and picture)"
            " or --unlisted drop (without their interactions)"
        )
    if choice == "keep":
        db.execute("INSERT INTO raw_items (item_id) SELECT item_id FROM unlisted")
        notify(f"{what}; kept without text and picture")
    else:
        db.execute("DELETE FROM raw_interactions WHERE item_id IN (SELECT item_id FROM unlisted)")
        notify(f"{what}; their interactions are left out")


def _id_order(column: str) -> str:
    """SQL that sorts ids as a person would: 2 before 10, numbers before words."""
    number = f"CASE WHEN regexp_full_match({column}, '[0-9]{{1,18}}') THEN {column}::BIGINT END"
    return f"{number} NULLS LAST, {column}"


def index_ids(db: duckdb.DuckDBPyConnection) -> None:
    """Replace ids by integers in the order of the ids: ``core`` (u, i, timestamp, ordinal)."""
    for key, column, source in (
        ("u", "user_id", "raw_interactions"),
        ("i", "item_id", "raw_items"),
    ):
        db.execute(
            f"CREATE TABLE {column}s AS SELECT {column}, row_number() OVER"
            f" (ORDER BY {_id_order(column)})::INTEGER AS {key}"
            f" FROM (SELECT DISTINCT {column} FROM {source})"
        )
    db.execute(
        "CREATE TABLE core AS SELECT u, i, timestamp, ordinal FROM raw_interactions"
        " JOIN user_ids USING (user_id) JOIN item_ids USING (item_id)"
    )
    db.execute("DROP TABLE raw_interactions")


def filter_core(db: duckdb.DuckDBPyConnection, k: int, name: str) -> None:
    """Iterate the k-core on users and items until nothing changes."""
    before = one(db, "SELECT count(DISTINCT u), count(DISTINCT i), count(*) FROM core")
    while k > 1:
        few = f"HAVING count(*) < {k}"
        (gone,) = db.execute(
            f"DELETE FROM core WHERE u IN (SELECT u FROM core GROUP BY u {few})"
            f" OR i IN (SELECT i FROM core GROUP BY i {few})"
        ).fetchall()[0]
        if not gone:
            break
    if one(db, "SELECT count(*) FROM core")[0] == 0:
        users, items, rows = before
        raise UserError(
            f"nothing is left of {name} after the {k}-core ({many(users, 'user')},"
            f" {many(items, 'item')}, {many(rows, 'interaction')} before it);"
            " give a smaller --k-core"
        )


def make_tables(
    db: duckdb.DuckDBPyConnection, *, name: str, format: str, raw: str, k: int, timestamps: bool
) -> DatasetInfo:
    """Make ``users`` and ``items``, dense, and ``ordered``; say what they hold."""
    db.execute(
        "CREATE TABLE users AS SELECT u, user_id, (row_number() OVER (ORDER BY u) - 1)::INTEGER"
        " AS user FROM user_ids SEMI JOIN core USING (u)"
    )
    # Without a filter the whole catalogue stays, also what nobody has clicked yet.
    only = "" if k == 0 else " SEMI JOIN core USING (i)"
    db.execute(
        "CREATE TABLE items AS SELECT i, item_id, (row_number() OVER (ORDER BY i) - 1)::INTEGER"
        f" AS item FROM item_ids{only}"
    )
    db.execute(
        "CREATE TABLE ordered AS SELECT u, i, timestamp,"
        " (row_number() OVER each - 1)::INTEGER AS position,"
        " coalesce(timestamp = lag(timestamp) OVER each, false) AS tie"
        " FROM core WINDOW each AS (PARTITION BY u ORDER BY timestamp, ordinal)"
    )
    db.execute("DROP TABLE core")
    (users,) = one(db, "SELECT count(*) FROM users")
    (items,) = one(db, "SELECT count(*) FROM items")
    interactions, ties = one(db, "SELECT count(*), count(*) FILTER (WHERE tie) FROM ordered")
    (fingerprint,) = one(
        db,
        "SELECT sha256(string_agg(strlen(item_id) || ':' || item_id, '' ORDER BY item)) FROM items",
    )
    # Of each row a number, of all numbers one: in bounded memory, and the same in any order.
    hashes = one(
        db,
        "SELECT "
        + ", ".join(
            f"md5(bit_xor(md5_number(concat_ws(':', item, {modality})))::VARCHAR)"
            for modality in MODALITIES
        )
        + " FROM items JOIN raw_items USING (item_id)",
    )
    return DatasetInfo(
        name=name,
        format=format,
        raw=raw,
        k_core=k,
        users=users,
        items=items,
        interactions=interactions,
        fingerprint=fingerprint,
        inputs=dict(zip(MODALITIES, hashes, strict=True)),
        timestamps=timestamps,
        tied=ties / interactions,
    )


def remarks(db: duckdb.DuckDBPyConnection, info: DatasetInfo) -> Iterator[str]:
    """What a person should know about the tables."""
    texts, images, videos, unseen = one(
        db,
        "SELECT count(text), count(image), count(video), count(*) FILTER (WHERE i NOT IN"
        " (SELECT i FROM ordered)) FROM items JOIN raw_items USING (item_id)",
    )
    yield (
        f"of {many(info.items, 'item')}, {texts} with text, {images} with a picture,"
        f" {videos} with a clip"
    )
    if unseen:
        yield f"{many(unseen, 'item')} without an interaction"
    if not info.timestamps:
        yield "no timestamps: the order of the raw file is the order of time"
        return
    (rows,) = one(
        db,
        "SELECT count(*) - count(DISTINCT (u, i, timestamp)) FROM ordered"
        " SEMI JOIN (SELECT DISTINCT u, timestamp FROM ordered WHERE tie) USING (u, timestamp)",
    )
    if rows:
        yield f"{many(rows, 'interaction')} the same as another in user, item and time; kept"
    if info.tied:
        yield f"{info.tied:.1%} of the interactions have the time of the one before; input order"


def write_tables(db: duckdb.DuckDBPyConnection, stage: Path) -> None:
    """Stream both tables into Parquet, sorted."""
    _stream(
        db,
        "SELECT item, item_id, text, image, video, attributes FROM items"
        " JOIN raw_items USING (item_id) ORDER BY item",
        ITEMS_SCHEMA,
        stage / "items" / "part-00000.parquet",
    )
    _stream(
        db,
        "SELECT user, user_id, item, timestamp, position FROM ordered"
        " JOIN users USING (u) JOIN items USING (i) ORDER BY user, position",
        INTERACTIONS_SCHEMA,
        stage / "interactions" / "part-00000.parquet",
    )


def _stream(db: duckdb.DuckDBPyConnection, sql: str, schema: pa.Schema, path: Path) -> None:
    with (
        atomic_write(path) as beside,
        pq.ParquetWriter(beside, schema, write_page_checksum=True) as writer,
    ):
        for batch in db.sql(sql).to_arrow_reader(ROW_GROUP):
            # DuckDB knows no NOT NULL in a result; the schema does, and a null here would be ours.
            assert not any(
                batch.column(field.name).null_count for field in schema if not field.nullable
            )
            columns = [batch.column(field.name).cast(field.type) for field in schema]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
