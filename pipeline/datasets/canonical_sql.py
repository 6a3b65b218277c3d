"""DuckDB SQL from the two raw tables to the canonical ones: k-core, order, dense indices.

The functions are called in the order of this file on one connection; each leaves its tables to the
next. Interactions that agree in user, item and time are kept by default, as in the published 5-core
sets, and counted by :func:`data_notes` (:mod:`pipeline.datasets.duplicates`).
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import pyarrow as pa

from features.atomic_files import parquet_writer
from features.errors import UserError
from features.registry import Registry
from features.schema import INTERACTIONS_SCHEMA, ITEMS_SCHEMA, MODALITIES
from features.warehouse import DatasetInfo
from pipeline.datasets.importers.base import Files
from pipeline.datasets.importers.messages import plural, quote_all
from pipeline.datasets.importers.raw_sql import fetch_row

ROW_GROUP = 131_072


# -- interactions with items that are not listed --------------------------------------------


def handle_unlisted(db: duckdb.DuckDBPyConnection, choice: str, files: Files) -> Iterator[str]:
    """Handle interactions whose item is not in ``raw_items``; yield messages for the user.

    Args:
        db: A connection with the raw tables.
        choice: A name in ``UNLISTED``.
        files: The raw files, for messages.

    Raises:
        UserError: There are such items, and the choice is ``refuse``.
    """
    db.execute(
        "CREATE TABLE unlisted AS SELECT item_id, count(*) AS n FROM raw_interactions"
        " ANTI JOIN raw_items USING (item_id) GROUP BY item_id"
    )
    items, rows, examples = fetch_row(
        db, "SELECT count(*), sum(n), list(item_id ORDER BY item_id)[:3] FROM unlisted"
    )
    if items:
        facts = (
            f"{plural(items, 'item')} of {plural(rows, 'interaction')}"
            f" (such as {quote_all(examples)}) not listed"
        )
        yield UNLISTED.find(choice)(db, facts, files)


def _refuse(db: duckdb.DuckDBPyConnection, facts: str, files: Files) -> str:
    raise UserError(
        f"{facts} in {files['items'][0]}; add them, or give --unlisted keep (without text and"
        " image) or --unlisted drop (without their interactions)"
    )


def _keep(db: duckdb.DuckDBPyConnection, facts: str, files: Files) -> str:
    db.execute("INSERT INTO raw_items (item_id) SELECT item_id FROM unlisted")
    return f"{facts}; kept without text and image"


def _drop(db: duckdb.DuckDBPyConnection, facts: str, files: Files) -> str:
    db.execute("DELETE FROM raw_interactions WHERE item_id IN (SELECT item_id FROM unlisted)")
    return f"{facts}; their interactions are dropped"


UNLISTED: Registry[Callable[[duckdb.DuckDBPyConnection, str, Files], str]] = Registry(
    "choice for --unlisted", {"refuse": _refuse, "keep": _keep, "drop": _drop}
)
"""Choice of ``--unlisted`` to a function that applies it and returns a message."""


# -- indices and k-core ---------------------------------------------------------------------


def _id_order(column: str) -> str:
    """Return SQL that sorts numeric ids by value and before all other ids."""
    number = f"CASE WHEN regexp_full_match({column}, '[0-9]{{1,18}}') THEN {column}::BIGINT END"
    return f"{number} NULLS LAST, {column}"


def index_ids(db: duckdb.DuckDBPyConnection) -> None:
    """Create ``core`` (u, i, timestamp, ordinal): integers in the order of the ids replace them."""
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


def sample_users(db: duckdb.DuckDBPyConnection, count: int, seed: int) -> None:
    """Keep the interactions of a random sample of users, which depends on their ids and the seed.

    Args:
        db: A connection with the tables ``core`` and ``user_ids``.
        count: Number of users; all are kept if there are no more.
        seed: Seed of the sample.
    """
    db.execute(
        "DELETE FROM core WHERE u NOT IN (SELECT u FROM user_ids"
        f" ORDER BY md5_number_lower('{seed}:' || user_id), u LIMIT {count})"
    )


def filter_core(db: duckdb.DuckDBPyConnection, k: int, name: str, min_user: int = 0) -> None:
    """Apply the iterated k-core: every remaining user and item has at least ``k`` interactions.

    Args:
        db: A connection with the table ``core``.
        k: Minimum number of interactions; 0 and 1 delete nothing.
        name: The dataset, for messages.
        min_user: Minimum number of interactions of users alone, where it is larger than ``k``.

    Raises:
        UserError: No interaction is left.
    """
    before = fetch_row(db, "SELECT count(DISTINCT u), count(DISTINCT i), count(*) FROM core")
    while max(k, min_user) > 1:
        (deleted,) = db.execute(
            "DELETE FROM core WHERE u IN"
            f" (SELECT u FROM core GROUP BY u HAVING count(*) < {max(k, min_user)})"
            f" OR i IN (SELECT i FROM core GROUP BY i HAVING count(*) < {k})"
        ).fetchall()[0]
        if not deleted:
            break
    if fetch_row(db, "SELECT count(*) FROM core")[0] == 0:
        users, items, rows = before
        raise UserError(
            f"nothing is left of {name} after the {k}-core ({plural(users, 'user')},"
            f" {plural(items, 'item')}, {plural(rows, 'interaction')} before it);"
            f" give a smaller --k-core{' or --min-user' if min_user > k else ''}"
        )


TIES: Registry[str] = Registry(
    "order of ties",
    {
        "file": "ordinal",
        "id": "i, ordinal",
        "id-desc": "i DESC, ordinal",
        # The lengths keep apart the pairs (a, bc) and (ab, c).
        "hash": "md5_number_lower(strlen(user_id) || ':' || user_id || item_id), i, ordinal",
    },
)
"""Choice of ``--ties`` to the SQL that orders the interactions of a user with equal times.

``id`` is the order of the item indices: ids of at most 18 digits count as numbers and come first,
the other ids follow as text. ``hash`` depends on the ids of the user and the item alone, so it is
the same for any order of the raw file and on any machine.
"""


def create_tables(db: duckdb.DuckDBPyConnection, k: int, ties: str) -> None:
    """Create ``users`` (u, user_id, user), ``items`` (i, item_id, item) and ``ordered``.

    ``user`` and ``item`` are dense, and hidden items are the last ones. ``ordered`` (u, i,
    timestamp, position, tie, ascends) has the interactions of each user in the order of time.
    ``tie`` marks those with the time of the one before in the raw file. ``ascends`` compares the
    items of these two and is NULL if the items are equal.

    Args:
        db: A connection with the tables ``core`` and ``hidden``.
        k: The k-core; 0 keeps the items without an interaction.
        ties: A name in ``TIES``.
    """
    db.execute(
        "CREATE TABLE users AS SELECT u, user_id, (row_number() OVER (ORDER BY u) - 1)::INTEGER"
        " AS user FROM user_ids SEMI JOIN core USING (u)"
    )
    # Without a filter the whole catalogue remains, including items without an interaction.
    core_only = "" if k == 0 else " WHERE i IN (FROM core SELECT i) OR i IN (FROM hidden)"
    db.execute(
        "CREATE TABLE items AS SELECT i, item_id, (row_number() OVER"
        " (ORDER BY i IN (FROM hidden), i) - 1)::INTEGER AS item"
        f" FROM item_ids{core_only}"
    )
    ids = " JOIN user_ids USING (u) JOIN item_ids USING (i)" if ties == "hash" else ""
    db.execute(
        "CREATE TABLE ordered AS SELECT u, i, timestamp, position, coalesce(tie, false) AS tie,"
        " CASE WHEN tie AND i <> before THEN i > before END AS ascends FROM (SELECT u, i,"
        " timestamp, (row_number() OVER chosen - 1)::INTEGER AS position,"
        " timestamp = lag(timestamp) OVER raw AS tie, lag(i) OVER raw AS before"
        f" FROM core{ids} WINDOW raw AS (PARTITION BY u ORDER BY timestamp, ordinal),"
        f" chosen AS (PARTITION BY u ORDER BY timestamp, {TIES.find(ties)}))"
    )
    db.execute("DROP TABLE core")


# -- facts ----------------------------------------------------------------------------------


def describe_tables(
    db: duckdb.DuckDBPyConnection,
    *,
    name: str,
    format: str,
    raw: str,
    k: int,
    timestamps: bool,
    ties: str,
) -> DatasetInfo:
    """Return the content of ``dataset.json``: the arguments, counts and fingerprints."""
    (users,) = fetch_row(db, "SELECT count(*) FROM users")
    (items,) = fetch_row(db, "SELECT count(*) FROM items")
    interactions, tied, ascending = fetch_row(
        db, "SELECT count(*), count(*) FILTER (WHERE tie), avg(ascends::INTEGER) FROM ordered"
    )
    (fingerprint,) = fetch_row(
        db,
        "SELECT sha256(string_agg(strlen(item_id) || ':' || item_id, '' ORDER BY item)) FROM items",
    )
    # XOR over a hash of each row needs little memory and does not depend on the order.
    hashes = fetch_row(
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
        tied=tied / interactions if interactions else 0.0,
        ties=ties,
        tied_ascending=ascending,
    )


def data_notes(db: duckdb.DuckDBPyConnection, info: DatasetInfo, copies: int = 0) -> Iterator[str]:
    """Yield messages for the user about the content of the tables, one line each.

    Args:
        db: A connection with the tables of :func:`create_tables`.
        info: The facts about the tables.
        copies: Number of interactions that are copies of an earlier one.
    """
    texts, images, videos, without = fetch_row(
        db,
        "SELECT count(text), count(image), count(video), count(*) FILTER (WHERE i NOT IN"
        " (SELECT i FROM ordered) AND i NOT IN (FROM hidden)) FROM items"
        " JOIN raw_items USING (item_id)",
    )
    yield (
        f"of {plural(info.items, 'item')}, {texts:,} with text, {images:,} with an image,"
        f" {videos:,} with a video"
    )
    if not info.interactions:
        yield "no interactions: a dataset of items for alignment and retrieval"
        return
    if without:
        yield f"{plural(without, 'item')} without an interaction"
    if not info.timestamps:
        yield "no timestamps: interactions are in the order of the raw file"
        return
    if copies:
        yield (
            f"{plural(copies, 'interaction')} equal to another in user, item and time; kept, so"
            f" {plural(info.copied_targets, 'held-out target')} are copies of an input row"
            " (--duplicate-interactions drop keeps one of each)"
        )
    if info.tied:
        ascending = "all of the same item"
        if info.tied_ascending is not None:
            ascending = f"item ids ascend in {info.tied_ascending:.1%} of these pairs in the file"
        others = ", ".join(name for name in TIES if name != info.ties)
        yield (
            f"{info.tied:.1%} of the interactions have the time of the user's previous interaction"
            f" ({ascending}); these are ordered by {info.ties} (--ties: {others})"
        )


# -- Parquet --------------------------------------------------------------------------------


def write_tables(db: duckdb.DuckDBPyConnection, stage: Path) -> None:
    """Write ``items`` and ``interactions`` below the folder ``stage`` as sorted Parquet files."""
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
    with parquet_writer(path, schema) as writer:
        for batch in db.sql(sql).to_arrow_reader(ROW_GROUP):
            # Results of DuckDB have no NOT NULL; a null here would be an error of this module.
            assert not any(
                batch.column(field.name).null_count for field in schema if not field.nullable
            )
            columns = [batch.column(field.name).cast(field.type) for field in schema]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
