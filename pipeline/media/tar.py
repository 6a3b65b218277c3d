"""Read images from a tar in place, by an index of offsets. Nothing is unpacked."""

import io
import os
import tarfile
from array import array
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from pipeline.media.errors import ContainerError, container_error

_MOST_LINKS = 8  # links to links that are followed
_MOST_HEADER = 1 << 20  # bytes of one header; names are shorter


class TarMember(NamedTuple):
    """One regular file of a tar, or a link."""

    name: str
    """Without a leading ``./``."""
    offset: int | None
    """None for a link that leads to no regular file of the tar."""
    size: int


def tar_members(path: Path) -> Iterator[TarMember]:
    """Yield the regular files of a tar in its order, without devices and sparse files.

    Links follow at the end, each with the place of the file of the same tar that it refers to, or
    without a place if there is none.

    Raises:
        ContainerError: The path is not a tar, or a compressed one.
    """
    links: dict[str, str] = {}
    for entry in _entries(path):
        name = entry.name.removeprefix("./")
        if entry.isreg() and not entry.issparse():
            links.pop(name, None)  # of two members of one name, the last counts
            yield TarMember(name, entry.offset_data, entry.size)
        elif entry.islnk():
            links[name] = entry.linkname.removeprefix("./")
        elif entry.issym():
            links[name] = os.path.normpath(os.path.join(os.path.dirname(name), entry.linkname))
    if links:
        yield from _linked_members(path, links)


def _linked_members(path: Path, links: Mapping[str, str]) -> Iterator[TarMember]:
    """Yield the links with the places of their files, in a second pass over the tar."""
    targets = {}
    for name in links:
        target = name
        for _ in range(_MOST_LINKS):  # a link may refer to a link, and links may form a circle
            target = links.get(target, target)
        targets[name] = target
    wanted = set(targets.values())
    files: dict[str, tuple[int, int]] = {
        name: (entry.offset_data, entry.size)
        for entry in _entries(path)
        if entry.isreg()
        and not entry.issparse()
        and (name := entry.name.removeprefix("./")) in wanted
    }
    for name, target in targets.items():
        yield TarMember(name, *files.get(target, (None, 0)))


def _entries(path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield every entry of a tar; one entry is in memory at a time."""
    try:
        with (
            _Headers(io.FileIO(path)) as stream,
            tarfile.open(fileobj=stream, mode="r:", errors="surrogateescape") as tar,
        ):
            while (entry := tar.next()) is not None:
                # tarfile would keep all entries in memory.
                tar.members = []  # type: ignore[attr-defined]
                yield entry
    except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
        raise container_error(path, "tar", error) from None


class _Headers(io.BufferedReader):
    """A file that limits each read to the size of a header: a false length costs no memory."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _MOST_HEADER:
            raise tarfile.ReadError("a header without end")
        return super().read(size)


class TarImages:
    """One tar, indexed once with 24 bytes of memory a member. Threads may read concurrently.

    Args:
        path: An uncompressed tar.

    Raises:
        ContainerError: The path is not a tar.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        names, extents = array("Q"), array("q")
        for member in tar_members(path):
            if member.offset is not None:
                names.append(_name_hash(member.name))
                extents.extend((member.offset, member.size))
        hashes = np.frombuffer(names, dtype=np.uint64) if names else np.zeros(0, np.uint64)
        order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[order]
        self._extents = np.frombuffer(extents or b"", dtype=np.int64).reshape(-1, 2)[order]
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
        """Return the size of one member in bytes.

        Raises:
            ContainerError: The tar has no member of this name.
        """
        return int(self._extents[self._row(name)][1])

    def get(self, name: str) -> bytes:
        """Return one member; of several with one name, the last, as ``tar`` itself does.

        Raises:
            ContainerError: The tar has no member of this name, or ends within the member.
        """
        offset, size = map(int, self._extents[self._row(name)])
        data = os.pread(self._file, size, offset)  # pread moves no file position and needs no lock
        if len(data) < size:
            raise ContainerError(
                f"{self.path} ends within {name!r}; copy it again", "truncated tar"
            )
        return data

    def _row(self, name: str) -> int:
        sought = np.uint64(_name_hash(name.removeprefix("./")))
        row = int(np.searchsorted(self._hashes, sought, side="right")) - 1
        if row < 0 or self._hashes[row] != sought:
            raise ContainerError(
                f"{self.path} has no member {name!r}; prepare the data again",
                "no such member in the tar",
            )
        return row


def _name_hash(name: str) -> int:
    """Return a 64-bit hash of a name. A collision within one tar is negligibly unlikely."""
    data = name.encode("utf-8", "surrogateescape")
    return int.from_bytes(blake2b(data, digest_size=8).digest())
