"""Files that are whole or absent: written beside, synced, renamed."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import filelock
import pyarrow as pa
import pyarrow.parquet as pq

from features.errors import UserError

_MOST_REASON = 200  # characters of what a library says
_UMASK = os.umask(0)  # the only way to learn it
os.umask(_UMASK)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path; on success it becomes ``path`` in one rename, else it vanishes.

    The temporary name starts with a dot and ends in ``.tmp``, so no glob of ours ever sees it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield beside
        with beside.open("rb+") as stream:
            os.fsync(stream.fileno())
        beside.chmod(0o666 & ~_UMASK)  # some libraries write for the owner alone
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` so that ``path`` holds all of it or what was there before."""
    with atomic_write(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, document: Any) -> None:
    """Write one JSON document, whole or not at all."""
    write_text(path, json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_table(path: Path, table: pa.Table, **options: Any) -> None:
    """Write one Parquet file, whole or not at all; ``options`` go to the Parquet writer."""
    with atomic_write(path) as beside:
        pq.write_table(table, beside, write_page_checksum=True, **options)


def open_table(path: Path, **options: Any) -> pq.ParquetFile:
    """Open one Parquet file, of which no page is given whose bytes are not those written.

    A checksum costs a tenth of the time of reading; files without any are read as they are.
    """
    return pq.ParquetFile(path, page_checksum_verification=True, **options)


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one Parquet file, or some of its columns, as :func:`open_table` does."""
    with open_table(path) as file:
        return file.read(columns=None if columns is None else list(columns))


@contextmanager
def read_errors(path: Path, remedy: str) -> Iterator[None]:
    """Say in one line that ``path`` cannot be read, whichever library found out.

    Raises:
        UserError: A file is damaged, absent, of other columns, or may not be read.
    """
    try:
        yield
    except UserError:
        raise
    except (pa.ArrowException, duckdb.Error, OSError, KeyError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read ({reason[:_MOST_REASON]}); {remedy}") from None


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed writer left in ``folder``: temporaries of :func:`atomic_write`."""
    for beside in folder.glob(".*.tmp"):
        if beside.is_dir():
            shutil.rmtree(beside)
        else:
            beside.unlink(missing_ok=True)


@contextmanager
def database() -> Iterator[duckdb.DuckDBPyConnection]:
    """Open DuckDB in memory; its progress bar would be written among a command's results."""
    with duckdb.connect() as db:
        db.execute("SET enable_progress_bar = false")
        yield db


@contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Hold ``path`` as an advisory lock; the system frees the lock when the process dies.

    A lock that another process holds is not waited for.

    Args:
        path: File that is locked. It is created if necessary, and stays.
        what: What the lock guards, for messages.

    Raises:
        UserError: Another process holds the lock, or the file cannot be created or locked.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file_lock = filelock.FileLock(path, blocking=False)
        file_lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"another process is writing {what} ({path}); wait for it or stop it"
        ) from None
    except OSError as error:
        raise UserError(
            f"{what} cannot be locked ({path}: {error.strerror}); make the folder writable"
        ) from None
    try:
        yield
    finally:
        file_lock.release()
