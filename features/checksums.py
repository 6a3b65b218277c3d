"""Checksums of files: a file that mmrec writes contains the checksum of its own bytes.

A writer puts ``EMPTY_CHECKSUM`` into the metadata of a file, and :func:`seal` replaces the zeros by
the CRC-32 of the whole file. The checksum is therefore complete whenever the file is, and it is
copied, moved and removed with the file. It depends on the bytes alone, not on times or names.
Files of earlier versions and files of other programs have no checksum and are not verified. A
checksum whose mark or digits are damaged is recognised by the part that is intact. A file that is
cut before its checksum does not have the form of its format any more.

A file of another table has a correct checksum of its own bytes. The document that is written last
for a table therefore records the checksums of its files, and :func:`verify_files` compares them.

CRC-32 detects accidents, not intent. It costs 0.3 CPU seconds a GB where BLAKE2b costs 1.2.
"""

import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_MARK = b"mmrec-crc32:"
_DIGITS = 8
EMPTY_CHECKSUM = (_MARK + b"0" * _DIGITS).decode()
"""Placeholder that :func:`seal` replaces; it is in the first or last 64 KiB of a file."""
_PATTERN = re.compile(re.escape(_MARK) + b"[0-9a-f]{%d}" % _DIGITS)
_DAMAGED_PATTERN = re.compile(
    rb"mmrec-crc32:|mmrec-.{6}[0-9a-f]{8}|.{6}crc32:[0-9a-f]{8}", flags=re.DOTALL
)
"""A checksum of which one part is damaged: a half of the mark, or the digits."""
_LARGE_FILE = 1 << 26  # bytes from which a file is written back in another thread
_SPAN = 1 << 16  # bytes at each end of a file that are searched for the checksum
_CHUNK = 1 << 18  # bytes that are read at once

_CHECKSUM_AT_END = (b"PAR1", b"\x93NUMPY")
"""First bytes of the files whose checksum is after the data."""
_verified: dict[str, tuple[tuple[int, ...], str | None]] = {}
"""Path of each verified file -> state of the file then, and its checksum, if it has one."""
os.register_at_fork(after_in_child=_verified.clear)


class ChangedBytesError(ValueError):
    """The bytes of a file are not those that were written."""


def seal(path: Path) -> None:
    """Replace the placeholder in a file by the checksum of the file.

    Args:
        path: A file that no other process reads yet. Its other bytes do not change.

    Raises:
        ValueError: The file has no placeholder at either end.
    """
    with path.open("rb+", buffering=0) as file:
        offset = _checksum_offset(file)
        if offset is None:
            raise ValueError(f"{path} has no placeholder of a checksum")
        with _written_back(file):
            checksum = _checksum(file, offset)
        file.seek(offset)
        file.write(checksum)


def verify(path: Path) -> str | None:
    """Check a file against its checksum; a file is read once in a process unless it changes.

    Returns:
        The digits of the checksum; None if the file has no checksum, so that nothing was checked.

    Raises:
        ChangedBytesError: The bytes have changed since the file was written.
        OSError: The file cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        state = (
            status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )  # fmt: skip
        known = _verified.get(str(path))
        if known is not None and known[0] == state:
            return known[1]
        offset = _checksum_offset(file)
        if offset is not None:
            file.seek(offset)
            if file.read(len(EMPTY_CHECKSUM)) != _checksum(file, offset):
                raise _changed(file)
        checksum = _digits(file, offset)
    _verified[str(path)] = (state, checksum)
    return checksum


def verify_files(paths: Iterable[Path], recorded: Mapping[str, str | None]) -> None:
    """Check the files of a table: their bytes, and that each is the file that was recorded.

    Args:
        paths: The files.
        recorded: Name of each file -> checksum, as :func:`read_checksums` returned it when the
            table was complete; empty for a table of an earlier version, which has no record.

    Raises:
        ChangedBytesError: The bytes of a file have changed, or the file is one of another table.
    """
    for path in paths:
        checksum = verify(path)
        if recorded and (path.name not in recorded or recorded[path.name] != checksum):
            raise ChangedBytesError(f"{path.name} is not the file that was written for this table")


def read_checksums(paths: Iterable[Path]) -> dict[str, str | None]:
    """Return the checksum that each file contains by the file's name, without checking it.

    A file without a checksum has None.
    """
    checksums = {}
    for path in paths:
        with path.open("rb", buffering=0) as file:
            checksums[path.name] = _digits(file, _checksum_offset(file))
    return checksums


def _digits(file: BinaryIO, offset: int | None) -> str | None:
    """Return the digits of the checksum at ``offset`` of a file."""
    if offset is None:
        return None
    file.seek(offset + len(_MARK))
    return file.read(_DIGITS).decode()


def _checksum_offset(file: BinaryIO) -> int | None:
    """Return the offset of the checksum, or None if the file has none.

    Parquet files and arrays of numpy have their checksum after the data: the last one of the end
    counts. Other files have it before the data: the first one of the beginning counts.

    Raises:
        ChangedBytesError: The file has only a checksum that is damaged.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    beginning = file.read(_SPAN)
    start = max(0, size - _SPAN)
    file.seek(start)
    end = file.read(_SPAN)
    if beginning.startswith(_CHECKSUM_AT_END):
        offsets = [start + match.start() for match in _PATTERN.finditer(end)][-1:]
    else:
        offsets = [match.start() for match in _PATTERN.finditer(beginning)][:1]
    if offsets:
        return offsets[0]
    if _DAMAGED_PATTERN.search(beginning) or _DAMAGED_PATTERN.search(end):
        raise _changed(file)
    return None


@contextmanager
def _written_back(file: BinaryIO) -> Iterator[None]:
    """Let a large file go to the disk while a block of code reads the file.

    The caller's own fsync then has little left to write.
    """
    if os.fstat(file.fileno()).st_size < _LARGE_FILE:
        yield
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        writing = pool.submit(os.fsync, file.fileno())
        yield
        writing.result()  # raises the error of a full disk


def _changed(file: BinaryIO) -> ChangedBytesError:
    name = Path(file.name).name
    return ChangedBytesError(f"the bytes of {name} have changed since it was written")


def _checksum(file: BinaryIO, offset: int) -> bytes:
    """Return the checksum of a file whose checksum at ``offset`` counts as the placeholder."""
    file.seek(0)
    crc = _crc_of(file, offset, 0)
    crc = zlib.crc32(EMPTY_CHECKSUM.encode(), crc)
    file.seek(offset + len(EMPTY_CHECKSUM))
    return _MARK + b"%08x" % _crc_of(file, None, crc)


def _crc_of(file: BinaryIO, count: int | None, crc: int) -> int:
    """Continue a CRC-32 with the next ``count`` bytes of a file, or with all to its end."""
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    while count is None or count > 0:
        part = view if count is None else view[: min(count, _CHUNK)]
        n_read = file.readinto(part)  # type: ignore[attr-defined]
        if not n_read:
            break
        crc = zlib.crc32(view[:n_read], crc)
        count = None if count is None else count - n_read
    return crc
