"""Pictures in a tar, read in place: an index of offsets, nothing unpacked, no name ever a path."""

import io
import os
import tarfile
from array import array
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from features.errors import UserError

_MOST_HEADER = 1 << 20  # bytes of one header; names are shorter


class Member(NamedTuple):
    """One plain file of a tar."""

    name: str
    """Without a leading ``./``."""
    offset: int
    size: int


class MissingMemberError(UserError):
    """The tar has no such member."""


def members(path: Path) -> Iterator[Member]:
    """Give the plain files of a tar in its order; links, devices and holes are left out.

    Raises:
        UserError: It is no tar, or a compressed one.
    """
    try:
        with (
            _Headers(io.FileIO(path)) as stream,
            tarfile.open(fileobj=stream, mode="r:", errors="surrogateescape") as tar,
        ):
            while (found := tar.next()) is not None:
                # Or it would remember all of them.
                tar.members = []  # type: ignore[attr-defined]
                if found.isreg() and not found.issparse():
                    yield Member(found.name.removeprefix("./"), found.offset_data, found.size)
    except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path} is not a readable tar ({reason[:100]}); copy it again, and unpack a"
            " compressed one to a plain .tar"
        ) from None


class _Headers(io.BufferedReader):
    """A file of which only headers can be read, so that a false length costs no memory."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _MOST_HEADER:
            raise tarfile.ReadError("a header without end")
        return super().read(size)


class TarImages:
    """One tar, indexed once; 24 bytes of memory a member. Reads from any number of threads.

    Raises:
        UserError: It is no tar.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        names, places = array("Q"), array("q")
        for member in members(path):
            names.append(_number(member.name))
            places.extend((member.offset, member.size))
        numbers = np.frombuffer(names, dtype=np.uint64) if names else np.zeros(0, np.uint64)
        order = np.argsort(numbers, kind="stable")
        self._numbers = numbers[order]
        self._places = np.frombuffer(places or b"", dtype=np.int64).reshape(-1, 2)[order]
        self._file = os.open(path, os.O_RDONLY)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def size(self, name: str) -> int:
        """Bytes of one member.

        Raises:
            MissingMemberError: There is none of this name.
        """
        return int(self._places[self._find(name)][1])

    def get(self, name: str) -> bytes:
        """One member; of several with one name, the last, as ``tar`` itself would have it.

        Raises:
            MissingMemberError: There is none of this name.
            UserError: The tar ends within it.
        """
        offset, size = map(int, self._places[self._find(name)])
        data = os.pread(self._file, size, offset)  # needs no lock: it moves no position
        if len(data) < size:
            raise UserError(f"{self.path} ends within {name!r}; copy it again")
        return data

    def _find(self, name: str) -> int:
        number = np.uint64(_number(name.removeprefix("./")))
        place = int(np.searchsorted(self._numbers, number, side="right")) - 1
        if place < 0 or self._numbers[place] != number:
            raise MissingMemberError(f"{self.path} has no member {name!r}; prepare the data again")
        return place


def _number(name: str) -> int:
    """Stand in for a name: 64 bits, of which no two of one tar will be the same by chance."""
    data = name.encode("utf-8", "surrogateescape")
    return int.from_bytes(blake2b(data, digest_size=8).digest())
