"""A small copy of a prepared dataset with its feature tables, for trial runs.

The copy has the last interactions of a few users, the items of these interactions, and the rows of
these items in every complete feature table. A hash of the ids chooses the users, so equal datasets
give equal copies. Of a dataset without users, a hash chooses the items.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import duckdb
import pyarrow as pa

from features.arrow_columns import positions
from features.atomic_files import lock
from features.dataset import load_items, verified_parts
from features.errors import UserError
from features.sql_text import parquet_sql
from features.store import FeatureStore, FeatureTable
from features.warehouse import DatasetInfo, Warehouse
from pipeline.datasets.canonical_sql import (
    create_tables,
    describe_tables,
    index_ids,
    write_tables,
)
from pipeline.datasets.database import preparation_database
from pipeline.datasets.prepare import table_hashes
from pipeline.datasets.swap import finish_swap, staging, swap_tables

USERS = 200
"""Users of a copy."""
INTERACTIONS = 20
"""Interactions of each of them, the last ones."""
ITEMS = 1000
"""Items of a copy of a dataset without users."""
_FOLDER = ".quick"
_COPIED = "copied"
"""Entry of the manifest of a copied table: a hash of the manifest that it was copied from."""


def copy_small(warehouse: Warehouse, names: list[str]) -> Warehouse:
    """Copy a part of some datasets into a warehouse of its own inside of this one.

    Args:
        warehouse: Warehouse with the datasets.
        names: Names of prepared datasets; the copies have the same names.

    Returns:
        The warehouse of the copies. A later call replaces the datasets, and copies only those
        feature tables that have changed.

    Raises:
        UserError: A dataset is not prepared, or its tables cannot be read.
    """
    small = Warehouse(warehouse.root / _FOLDER)
    for name in dict.fromkeys(names):
        info = _copy_tables(warehouse, small, name)
        item_ids = load_items(small, name, ["item_id"]).column("item_id")
        for table in FeatureStore(warehouse).tables(name):
            _copy_features(table, FeatureStore(small), info, item_ids)
    return small


def _copy_tables(warehouse: Warehouse, small: Warehouse, name: str) -> DatasetInfo:
    """Write the canonical tables of a copy."""
    info = warehouse.info(name)
    for table in ("items", "interactions"):
        verified_parts(warehouse, name, table)
    folder = small.dataset_dir(name)
    finish_swap(folder, name)
    with staging(small, name) as stage:
        with preparation_database(stage, info.raw) as db:
            _read_part(db, warehouse.dataset_dir(name), info)
            index_ids(db)
            db.execute("CREATE TABLE hidden (i INTEGER)")
            create_tables(db, 0, "file")
            copied = describe_tables(
                db,
                name=name,
                format=info.format,
                raw=info.raw,
                k=info.k_core,
                timestamps=info.timestamps,
                ties="file",
            )
            write_tables(db, stage)
        swap_tables(
            folder, stage, replace(copied, ties=info.ties, **table_hashes(stage, copied.users))
        )
    return small.info(name)


def _read_part(db: duckdb.DuckDBPyConnection, folder: Path, info: DatasetInfo) -> None:
    """Create ``raw_interactions`` and ``raw_items`` of the users or items of a copy."""
    interactions, items = (parquet_sql(folder / table) for table in ("interactions", "items"))
    db.execute(
        "CREATE TABLE chosen AS SELECT user, max(position) AS last FROM"
        f" {interactions} GROUP BY user ORDER BY md5_number_lower(any_value(user_id)), user"
        f" LIMIT {USERS}"
    )
    # The order within a user is that of the dataset, whatever the times are.
    db.execute(
        "CREATE TABLE part AS SELECT user, user_id, item, timestamp, position FROM"
        f" {interactions} JOIN chosen USING (user) WHERE position > last - {INTERACTIONS}"
    )
    subset = "SEMI JOIN part USING (item)"
    if not info.interactions:
        subset = f"ORDER BY md5_number_lower(item_id), item LIMIT {ITEMS}"
    db.execute(
        "CREATE TABLE raw_items AS SELECT item_id, text, image, video, attributes FROM"
        f" {items} {subset}"
    )
    db.execute(
        "CREATE TABLE raw_interactions AS SELECT user_id, item_id, timestamp,"
        " row_number() OVER (ORDER BY user, position) AS ordinal FROM part"
        f" JOIN (SELECT item, item_id FROM {items}) USING (item)"
    )


def _copy_features(
    table: FeatureTable, store: FeatureStore, info: DatasetInfo, item_ids: pa.ChunkedArray
) -> None:
    """Copy the rows of the items of a copy, unless they have been copied before."""
    manifest, provenance = table.manifest(), table.provenance()
    if manifest is None or provenance is None:
        return  # unfinished
    copy = store.table(info.name, table.backbone, table.modality, table.level)
    with lock(copy.path / ".lock", f"the copy of {table.label}"):
        digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        stamp = {_COPIED: digest, "inputs": info.inputs_of(table.modality)}
        known = _manifest_of(copy)
        if known | stamp == known and known.get("items") == info.fingerprint:
            return
        table.verify(manifest)
        copy.clear()
        for part in table.parts():
            ids = table.rows(part, ["item_id"]).column("item_id")
            item = positions(ids, item_ids)
            is_kept = item >= 0
            if not is_kept.any():
                continue
            rows = table.rows(part)
            rows = rows.set_column(0, rows.schema.field("item"), pa.array(item, pa.int32()))
            rows = rows.filter(pa.array(is_kept)).replace_schema_metadata(None)
            copy.append(rows.combine_chunks(), provenance)
        copy.finish(info.fingerprint, provenance, **stamp)


def _manifest_of(copy: FeatureTable) -> dict[str, object]:
    """Return the manifest of a copy; empty if there is none that can be read."""
    try:
        return copy.manifest() or {}
    except UserError:
        return {}
