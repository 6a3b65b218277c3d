"""Raw files to canonical tables: the importer, the SQL, and how the result takes its place."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from features.atomic_files import database, lock, remove_leftovers, sync_folder, write_json
from features.errors import UserError, unknown
from features.warehouse import MARKER, DatasetInfo, Warehouse
from pipeline.datasets.canonical_sql import (
    UNLISTED,
    filter_core,
    index_ids,
    make_tables,
    remarks,
    settle_unlisted,
    write_tables,
)
from pipeline.datasets.importers import bili, movielens, sequences, table
from pipeline.datasets.importers.base import Importer, check
from pipeline.datasets.importers.blobs import MEDIA, store_blobs
from pipeline.datasets.importers.raw_sql import lacks_room
from pipeline.datasets.registry import DATASETS, locate, plan

IMPORTERS: dict[str, Importer] = {
    "movielens": movielens.read,
    "sequences": sequences.read,
    "bili": bili.read,
    "table": table.read,
}
MEMORY = "2GB"  # DuckDB's buffers; beyond it, it spills
_PARTS = ("items", "interactions", MEDIA)
_LOCK = ".prepare.lock"
_READY = ".prepared"
"""A folder of new tables, whole, on their way to their places."""


def _silent(message: str) -> None:
    """Say nothing."""


def prepare(
    warehouse: Warehouse,
    name: str,
    *,
    to: str | None = None,
    raw: Path | None = None,
    k_core: int | None = None,
    format: str | None = None,
    files: Mapping[str, str] | None = None,
    unlisted: str = "refuse",
    notify: Callable[[str], None] = _silent,
) -> DatasetInfo:
    """Write the canonical tables of a dataset, replacing those of an earlier preparation.

    The same input gives the same bytes. After a failure the earlier tables stand untouched; what
    a kill among the renames at its end has left undone, the next call completes.

    Args:
        warehouse: Where they go.
        name: A known dataset, or any name together with ``format``.
        to: What the prepared dataset is called, so that several preparations of one stand beside
            each other; by default ``name``.
        raw: The raw folder; by default that of the last preparation of ``name``, else the
            warehouse's own for it.
        k_core: Users and items with fewer interactions go, again and again until none is left. 1
            leaves out items that nobody has, 0 keeps them; by default what suits the dataset.
        format: A layout, for data of one's own; prepared again, it keeps its own.
        files: Role to path, replacing the names that are looked for.
        unlisted: What becomes of interactions with an item that the items' file does not list:
            ``refuse``, ``keep`` (an item without text or picture) or ``drop``.
        notify: Takes one line of what was noticed, for the person who prepares.

    Raises:
        UserError: A file is missing or damaged, contradicts another, or nothing is left.
    """
    target = name if to is None else to
    home = warehouse.dataset_dir(target)
    if target != name and target in DATASETS:
        raise UserError(f"--name {target} is a dataset of its own; give another name")
    if (home / _READY).exists():
        with lock(home / _LOCK, f"the dataset {target}"):
            _complete(home)
    earlier = _earlier(warehouse, name)
    if earlier and (name not in DATASETS or earlier.format != DATASETS[name].importer):
        format = format or earlier.format
    how = plan(name, format)
    k = how.k_core if k_core is None else k_core
    if k < 0:
        raise UserError(f"--k-core {k} is negative; give 0 for no filter, or 5 as most papers do")
    if unlisted not in UNLISTED:
        raise unknown("choice for --unlisted", unlisted, list(UNLISTED))
    root = raw or (Path(earlier.raw) if earlier else warehouse.raw_dir(name))
    if name == "demo" and format is None and not root.exists():
        from pipeline.datasets.demo import make_demo

        make_demo(root)
        notify(f"made the demo's raw files in {root}")
    found = locate(name, how, root, files or {})
    with _staging(warehouse, target) as stage:
        with _database(stage) as db:
            told = IMPORTERS[how.importer](db, root, found)
            check(db, found)
            for note in told.notes:
                notify(note)
            settle_unlisted(db, unlisted, found, notify)
            index_ids(db)
            filter_core(db, k, name)
            if told.blobs:
                store_blobs(db, told.blobs, root, stage / MEDIA, all_items=k == 0)
            info = make_tables(
                db,
                name=target,
                format=how.importer,
                raw=str(root.resolve()),
                k=k,
                timestamps=told.timestamps,
            )
            write_tables(db, stage)
            for line in remarks(db, info):
                notify(line)
        _swap(home, stage, info)
    return info


def describe(warehouse: Warehouse) -> list[dict[str, Any]]:
    """One row for each known or prepared dataset: what it is, what is there, what is prepared."""
    prepared = set(warehouse.datasets())
    rows = []
    for name in [*DATASETS, *sorted(prepared - set(DATASETS))]:
        known = DATASETS.get(name)
        info = _earlier(warehouse, name)
        root = Path(info.raw) if info else warehouse.raw_dir(name)
        row: dict[str, Any] = {
            "dataset": name,
            "format": known.importer if known else info.format if info else "",
            "source": known.source if known else "your own",
            "raw": str(root),
            "expected": {},
            "raw_found": root.is_dir(),
            "prepared": info is not None,
            "damaged": info is None and warehouse.is_prepared(name),
            "users": info.users if info else None,
            "items": info.items if info else None,
            "interactions": info.interactions if info else None,
            "k_core": info.k_core if info else known.k_core if known else None,
        }
        if known:
            how = plan(name, None)
            row["expected"] = {role: list(how.files[role]) for role in how.needed}
            try:
                locate(name, how, root, {})
            except UserError:
                row["raw_found"] = False
        rows.append(row)
    return rows


def _earlier(warehouse: Warehouse, name: str) -> DatasetInfo | None:
    """What an earlier preparation says; a damaged one says nothing and will be replaced."""
    try:
        return warehouse.info(name) if warehouse.is_prepared(name) else None
    except UserError:
        return None


@contextmanager
def _staging(warehouse: Warehouse, name: str) -> Iterator[Path]:
    """A folder beside the tables that vanishes, and with it all traces when nothing came of it."""
    folder = warehouse.dataset_dir(name)
    new_root, new_folder = not warehouse.root.exists(), not folder.exists()
    new_marker = not (warehouse.root / MARKER).exists()
    warehouse.create()
    with lock(folder / _LOCK, f"the dataset {name}"):
        remove_leftovers(folder)
        stage = folder / f".prepare.{secrets.token_hex(4)}.tmp"
        stage.mkdir()
        try:
            yield stage
        except BaseException:
            if new_folder:
                shutil.rmtree(folder)
            if new_marker and [path.name for path in warehouse.root.iterdir()] == [MARKER]:
                (warehouse.root / MARKER).unlink()
                if new_root:
                    warehouse.root.rmdir()
            raise
        finally:
            shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def _database(stage: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """DuckDB in memory, bounded, that spills into the stage and loads nothing from anywhere."""
    with database() as db:
        db.execute(f"SET memory_limit = '{MEMORY}'")
        db.execute(f"SET threads = {min(os.cpu_count() or 1, 8)}")
        db.execute("SET preserve_insertion_order = true")
        db.execute("SET autoinstall_known_extensions = false")
        db.execute("SET temp_directory = $spill", {"spill": str(stage / "spill")})
        try:
            yield db
        except (duckdb.Error, pa.ArrowException) as error:
            if not lacks_room(error):
                raise
            reason = str(error).splitlines()[0][:160]
            raise UserError(
                f"no room for preparing in {MEMORY} of memory and on the disk of {stage.parent}"
                f" ({reason}); free some there or give another --warehouse; what was there stands"
            ) from None


def _swap(folder: Path, stage: Path, info: DatasetInfo) -> None:
    """Put the new tables in place of the old; up to one rename these stand, from it on those."""
    for part in _PARTS:
        (stage / part).mkdir(exist_ok=True)  # an empty one takes the old one's place as well
    write_json(stage / "dataset.json", asdict(info))
    os.replace(stage, folder / _READY)
    sync_folder(folder)
    _complete(folder)


def _complete(folder: Path) -> None:
    """Move what is ready to its place, from wherever a kill has stopped it."""
    ready = folder / _READY
    if not ready.exists():
        return
    if (ready / "dataset.json").exists():
        (folder / "dataset.json").unlink(missing_ok=True)  # while anything moves, nothing is whole
        for part in _PARTS:
            if (ready / part).exists():
                if (folder / part).exists():
                    os.replace(folder / part, ready / f"old-{part}")
                os.replace(ready / part, folder / part)
        with suppress(OSError):  # it holds something, or a kill came after this
            (folder / MEDIA).rmdir()
        sync_folder(folder)  # the tables before what says that they are whole
        os.replace(ready / "dataset.json", folder / "dataset.json")
        sync_folder(folder)
    shutil.rmtree(ready)
