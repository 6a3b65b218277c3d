"""Replacing the tables of a dataset: the old ones stay whole until the new ones are complete."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np

from features.atomic_files import database, lock, remove_leftovers, require_path, sync_folder
from features.dataset import hash_sequences
from features.documents import write_json
from features.sql_text import parquet_sql
from features.warehouse import MARKER, DatasetInfo, Warehouse
from pipeline.datasets.importers.image_column import MEDIA

_PARTS = ("items", "interactions", MEDIA)
_LOCK = ".prepare.lock"
_READY = ".prepared"
"""Folder of complete new tables that are being moved to their places."""


@contextmanager
def staging(warehouse: Warehouse, name: str) -> Iterator[Path]:
    """Lock a dataset and yield a temporary folder for its new tables.

    After an error no trace is left: the folder of the dataset and the warehouse are removed if
    they did not exist before.
    """
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
                shutil.rmtree(folder, ignore_errors=True)
            if new_marker and [path.name for path in warehouse.root.iterdir()] == [MARKER]:
                (warehouse.root / MARKER).unlink()
                if new_root:
                    warehouse.root.rmdir()
            raise
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def swap_tables(folder: Path, stage: Path, info: DatasetInfo) -> None:
    """Replace the tables in ``folder`` by those in ``stage``.

    Until one rename the old tables are valid, and after this rename the new ones: if the process
    is killed later, :func:`finish_swap` does the rest.

    Raises:
        UserError: The folder was removed since it was locked.
    """
    require_path(folder / _LOCK)
    for part in _PARTS:
        (stage / part).mkdir(exist_ok=True)  # an empty folder replaces an old one as well
    write_json(stage / "dataset.json", asdict(info))
    os.replace(stage, folder / _READY)
    sync_folder(folder)
    _move_ready(folder)


def hash_table(interactions: Path, users: int) -> str:
    """Return the hash of the sequences in a table of interactions.

    Args:
        interactions: Folder of the table.
        users: Number of users.
    """
    if not any(interactions.glob("*.parquet")):
        return hash_sequences(np.zeros(0, np.int32), np.zeros(1, np.int64))
    with database() as db:
        flat = db.execute(
            f"SELECT user, item FROM {parquet_sql(interactions)} ORDER BY user, position"
        ).fetchnumpy()
    lengths = np.bincount(flat["user"], minlength=users)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return hash_sequences(np.ascontiguousarray(flat["item"], dtype=np.int32), offsets)


def finish_swap(folder: Path, name: str) -> None:
    """Finish a replacement that a kill interrupted, if there is one."""
    if (folder / _READY).exists():
        with lock(folder / _LOCK, f"the dataset {name}"):
            _move_ready(folder)


def _move_ready(folder: Path) -> None:
    """Move the new tables to their places; every step can be the first one after a kill."""
    ready = folder / _READY
    if not ready.exists():
        return
    if (ready / "dataset.json").exists():
        # Without dataset.json no reader takes the tables for complete.
        (folder / "dataset.json").unlink(missing_ok=True)
        for part in _PARTS:
            if (ready / part).exists():
                if (folder / part).exists():
                    os.replace(folder / part, ready / f"old-{part}")
                os.replace(ready / part, folder / part)
        with suppress(OSError):  # not empty, or removed before a kill
            (folder / MEDIA).rmdir()
        sync_folder(folder)  # the tables before dataset.json
        os.replace(ready / "dataset.json", folder / "dataset.json")
        sync_folder(folder)
    shutil.rmtree(ready)
