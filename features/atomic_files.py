"""Files that are complete or absent: written under a temporary name, synced, renamed."""

import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import duckdb
import filelock
import pyarrow as pa
import pyarrow.parquet as pq

from features.checksums import EMPTY_CHECKSUM, seal, verify
from features.errors import DamagedError, OutOfMemoryError, UserError, no_permission
from features.memory import check_memory, is_out_of_memory, memory_reason

_MOST_REASON = 200  # characters of a library's message
_UMASK = os.umask(0)  # there is no other way to read it
os.umask(_UMASK)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path, which is renamed to ``path`` on success and removed otherwise.

    The temporary name starts with a dot and ends in ``.tmp``, so that no glob of mmrec matches it.
    The temporary file is locked until the end, so that :func:`remove_leftovers` does not remove it.

    Raises:
        OSError: The file cannot be written, such as on a full disk; the error names ``path``.
        UserError: ``path`` is a folder.
    """
    if not path.name or path.is_dir():
        raise UserError(f"{path} is a folder, so no file can have this name; name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    temporary, handle = _create_locked(path)
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~_UMASK)  # some libraries write files that only the owner can read
        os.replace(temporary, path)
    except OSError as error:
        # Libraries raise errors without a name, or with the temporary name.
        if error.filename not in (None, temporary, str(temporary)):
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        os.close(handle)
    sync_folder(path.parent)


def require_path(path: Path) -> None:
    """Check that a folder, or a file in it, still exists before another file is written.

    :func:`atomic_write` would create the folder again, and the result would look complete.

    Raises:
        UserError: The path was removed.
    """
    if not path.exists():
        raise _removed(path)


def _removed(path: Path) -> UserError:
    return UserError(
        f"{path} was removed or moved while this command used it; run the command again, and"
        " leave its files in place until it ends"
    )


def _create_locked(path: Path) -> tuple[Path, int]:
    """Create a temporary file for ``path`` and lock it; return its path and its open handle."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if temporary.exists():  # else another process took it for a leftover before the lock
            return temporary, handle
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that renames in it survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file, complete or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_table(
    path: Path, table: pa.Table, *, row_group_size: int | None = None, **options: Any
) -> None:
    """Write one Parquet file with its checksum, complete or not at all.

    Args:
        path: The file.
        table: Its content.
        row_group_size: Largest number of rows of a row group.
        options: Options of the Parquet writer.
    """
    with parquet_writer(path, table.schema, **options) as writer:
        writer.write_table(table, row_group_size)


@contextmanager
def parquet_writer(path: Path, schema: pa.Schema, **options: Any) -> Iterator[pq.ParquetWriter]:
    """Yield the writer of one Parquet file, which is complete on success and absent otherwise.

    The pages have checksums of their own, which other programs can verify.
    """
    with atomic_write(path) as temporary:
        with pq.ParquetWriter(temporary, schema, write_page_checksum=True, **options) as writer:
            yield writer
            writer.add_key_value_metadata({"checksum": EMPTY_CHECKSUM})
        seal(temporary)


def open_table(path: Path, **options: Any) -> pq.ParquetFile:
    """Open one Parquet file, and check that its bytes are those that were written.

    In a file without a checksum, the checksums of the pages are verified while they are read. A
    file of another program may have neither.

    Raises:
        ChangedBytesError: The bytes have changed.
    """
    return pq.ParquetFile(path, page_checksum_verification=not verify(path), **options)


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one Parquet file, or some of its columns, as :func:`open_table` does."""
    with open_table(path) as file:
        return file.read(columns=None if columns is None else list(columns))


@contextmanager
def read_errors(path: Path, remedy: str) -> Iterator[None]:
    """Turn any library's error on reading ``path`` into one line with a remedy.

    Raises:
        DamagedError: A file is damaged or missing, or has other columns.
        UserError: There is no permission to read the file, or no memory.
    """
    try:
        yield
    except UserError:
        raise
    except PermissionError as error:
        raise no_permission(error.filename or path) from None
    except (
        pa.ArrowException, duckdb.Error, MemoryError, RuntimeError, OSError, EOFError, KeyError,
        ValueError, TypeError,
    ) as error:  # fmt: skip
        if is_out_of_space(error):
            kind = OutOfMemoryError if is_out_of_memory(error) else UserError
            raise kind(
                f"{path}: not enough memory or disk space to read it ({memory_reason(error)});"
                " free memory and disk space"
            ) from None
        if isinstance(error, RuntimeError) and not isinstance(error, RecursionError):
            raise
        reason = " ".join(str(error).split())
        raise DamagedError(f"{path} cannot be read ({reason[:_MOST_REASON]}); {remedy}") from None


def is_out_of_space(error: BaseException) -> bool:
    """Return whether an error means that no memory or disk space is left.

    DuckDB and Arrow raise several classes of errors for it, and wrap each other's messages.
    """
    phrases = ("Out of Memory Error", "No space left on device", "Disk quota exceeded")
    return is_out_of_memory(error) or any(phrase in str(error) for phrase in phrases)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files of :func:`atomic_write` that a killed process left.

    The files of a process that is alive are locked, and they stay.

    Args:
        folder: Folder of the files.
        name: Name of the file that the temporary files were to become; None: any.
    """
    pattern = f".{'*' if name is None else glob.escape(name)}.*.tmp"
    for temporary in folder.glob(pattern):
        if temporary.is_dir():  # made under a lock of the folder, which the caller holds
            shutil.rmtree(temporary, ignore_errors=True)
        elif _is_abandoned(temporary):
            temporary.unlink(missing_ok=True)


def _is_abandoned(temporary: Path) -> bool:
    """Return True if no process holds the lock of a temporary file."""
    try:
        with temporary.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # locked, removed meanwhile, or on a file system without locks
        return False
    return True


@contextmanager
def database() -> Iterator[duckdb.DuckDBPyConnection]:
    """Open DuckDB in memory, without the progress bar that it writes to standard output.

    Raises:
        OutOfMemoryError: The limit of the process or its control group is too small for DuckDB.
    """
    check_memory("DuckDB")
    with duckdb.connect() as db:
        db.execute("SET enable_progress_bar = false")
        yield db


class FolderLock:
    """A lock that this process holds on a folder.

    Args:
        path: The locked file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = path.stat().st_ino

    def check(self) -> None:
        """Check that the folder is the one that was locked.

        Raises:
            UserError: The folder or the lock file was removed or replaced.
        """
        try:
            is_same = self._path.stat().st_ino == self._inode
        except OSError:
            is_same = False
        if not is_same:
            raise _removed(self._path.parent)


@contextmanager
def lock(path: Path, what: str) -> Iterator[FolderLock]:
    """Hold ``path`` as an advisory lock; the system frees the lock when the process dies.

    A lock that another process holds is not waited for.

    Args:
        path: File that is locked. It is created if necessary, and stays.
        what: What the lock guards, for messages.

    Raises:
        UserError: Another process holds the lock, or the file cannot be created or locked. The
            body ended without an error, but the folder was removed meanwhile.
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
        folder_lock = FolderLock(path)
        yield folder_lock
        folder_lock.check()
    finally:
        file_lock.release()
