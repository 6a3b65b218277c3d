"""Read the bytes that a reference names: a file, a member of a tar or a key of an LMDB."""

import io
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from features.errors import DamagedError, UserError
from pipeline.media.errors import ContainerError, MediaError, media_errors, one_line
from pipeline.media.lmdb import LmdbImages
from pipeline.media.raw_storage import RawStorage
from pipeline.media.references import (
    OUTSIDE,
    PREPARED,
    container_kind,
    member_name,
    relative_path,
)
from pipeline.media.tar import TarImages

_DAMAGE = ("file not found", "not a readable tar", "no such member in the tar", "truncated tar")
"""Reasons that an image which preparation copied can have only if the tar is damaged."""
MAX_FILE_BYTES = 256 << 20
"""Size limit of one encoded image."""


class MediaReader:
    """Read images and open videos by reference (see :mod:`pipeline.media.references`).

    Containers are opened once and shared by all threads.

    Args:
        raw: The folder of the raw files, here or in object storage. No file outside it is read.
        prepared: The dataset's own folder, which holds the images that preparation copied from a
            table.
    """

    def __init__(self, raw: Path | RawStorage, prepared: Path | None = None) -> None:
        self._storage = None if isinstance(raw, Path) else raw
        self.raw = raw if isinstance(raw, Path) else raw.copies
        self._prepared = prepared
        self._containers: dict[Path, LmdbImages | TarImages | MediaError] = {}
        self._opening = threading.Lock()

    def read(self, reference: str) -> bytes | Image.Image:
        """Read one image.

        Returns:
            The encoded image, or its pixels if an LMDB holds pixels.

        Raises:
            DamagedError: The image is one that preparation copied, and its bytes have changed.
            MediaError: The image cannot be read, or is larger than :data:`MAX_FILE_BYTES`.
            UserError: The object storage cannot be read.
        """
        if reference.startswith(PREPARED):
            return self._read_prepared(reference)
        return self._read(reference)

    def _read_prepared(self, reference: str) -> bytes | Image.Image:
        """Read an image that preparation copied, and compare its bytes with its name."""
        _, _, name = reference.partition("#")
        try:
            data = self._read(reference)
        except MediaError as error:
            if error.reason not in _DAMAGE:  # such as an empty value of the column
                raise
            reason = error.reason
        else:
            if not isinstance(data, bytes) or name == member_name(data):
                return data
            reason = "its bytes have changed since it was written"
        raise DamagedError(
            f"{self._prepared}/{reference.removeprefix(PREPARED)} is damaged ({reason});"
            " run mmrec prepare again"
        )

    def _read(self, reference: str) -> bytes | Image.Image:
        path = self._path(reference)
        member = self._member(reference, path)
        if member is not None:
            return _read_member(*member)
        path = _require_path(path)
        if self._storage is not None and (name := self._stored_name(path)) is not None:
            with media_errors():
                data = self._storage.folder.read(name, MAX_FILE_BYTES + 1)
            _check_bytes(len(data), MAX_FILE_BYTES)
            return data
        _check_file(path, MAX_FILE_BYTES)
        with media_errors():
            return path.read_bytes()

    def exists(self, reference: str) -> bool:
        """Return True if the reference names a file, or a part of a container that can be read."""
        path = self._path(reference)
        try:
            if path is not None and os.path.isfile(path):
                return True
            member = self._member(reference, path)
            return member is not None and member[0].size(member[1]) >= 0
        except (MediaError, ContainerError, ValueError):  # ValueError: a null character
            return False

    def open(self, reference: str) -> io.BufferedReader:
        """Open one video.

        Raises:
            MediaError: The file cannot be read.
            UserError: The object storage cannot be read.
        """
        path = _require_path(self._path(reference))
        if self._storage is not None and (name := self._stored_name(path)) is not None:
            with media_errors():
                stream = self._storage.open(name)
            _check_bytes(os.fstat(stream.fileno()).st_size, None)
            return stream
        _check_file(path)
        with media_errors():
            return path.open("rb")

    def close(self) -> None:
        """Close the open containers."""
        for images in self._containers.values():
            if not isinstance(images, MediaError):
                images.close()
        self._containers.clear()

    def _path(self, reference: str) -> Path | None:
        """Return the path of a reference, or None if the reference leaves the allowed folders."""
        if reference.startswith(OUTSIDE):
            return Path(reference.removeprefix(OUTSIDE))
        base: Path | None = self.raw
        if reference.startswith(PREPARED):
            base, reference = self._prepared, reference.removeprefix(PREPARED)
        tail = relative_path(base, reference) if base is not None else None
        return base / tail if base is not None and tail is not None else None

    def _member(
        self, reference: str, path: Path | None
    ) -> tuple[LmdbImages | TarImages, str] | None:
        """Return the container and the part that a reference names; None for a plain file."""
        # The name of a plain file may look like a reference into a container.
        if "#" in reference and (path is None or not self._is_plain_file(path)):
            end = reference.find("#")
            while end != -1:
                prefix = self._path(reference[:end])
                if prefix is not None and (images := self._container(prefix)) is not None:
                    return images, reference[end + 1 :]
                end = reference.find("#", end + 1)
        return None

    def _stored_name(self, path: Path) -> str | None:
        """Return the name of the object at a path; None if the path is not of the raw folder."""
        return path.relative_to(self.raw).as_posix() if path.is_relative_to(self.raw) else None

    def _is_plain_file(self, path: Path) -> bool:
        """Return True for a file on this machine; of objects, containers have precedence."""
        return self._storage is None and os.path.isfile(path)

    def _container(self, path: Path) -> LmdbImages | TarImages | None:
        """Return the open container at a path, or None if the path is not a container."""
        with self._opening:
            if path not in self._containers:
                if self._storage is not None and (name := self._stored_name(path)) is not None:
                    self._storage.fetch_container(name)
                kind = container_kind(path)
                if kind is None:
                    return None
                try:
                    self._containers[path] = _OPEN[kind](path)
                except ContainerError as error:
                    self._containers[path] = MediaError("read", error.reason)
                except OSError as error:
                    self._containers[path] = MediaError("read", one_line(error))
            images = self._containers[path]
        if isinstance(images, MediaError):
            raise images
        return images


_OPEN: dict[str, Callable[[Path], LmdbImages | TarImages]] = {"lmdb": LmdbImages, "tar": TarImages}


def _require_path(path: Path | None) -> Path:
    if path is None:
        raise MediaError("read", "leads outside the raw folder")
    return path


def _read_member(images: LmdbImages | TarImages, name: str) -> bytes | Image.Image:
    try:
        _check_bytes(images.size(name), MAX_FILE_BYTES)
        return images.get(name)
    except ContainerError as error:
        raise MediaError("read", error.reason) from None
    except UserError:
        raise MediaError("decode", "not an image of the kind that LMDBs hold") from None
    except OSError as error:
        raise MediaError("read", one_line(error)) from None


def _check_file(path: Path, max_bytes: int | None = None) -> None:
    """Raise MediaError unless the path is a regular file: reading a pipe might never end."""
    with media_errors():
        status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise MediaError("read", "is a folder")
    if not stat.S_ISREG(status.st_mode):
        raise MediaError("read", "is not a regular file")
    _check_bytes(status.st_size, max_bytes)


def _check_bytes(size: int, max_bytes: int | None) -> None:
    if size == 0:
        raise MediaError("read", "empty file")
    if max_bytes is not None and size > max_bytes:
        raise MediaError("read", f"file larger than {max_bytes >> 20} MiB")
