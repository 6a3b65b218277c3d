"""The raw folder of a preparation: a folder of this machine, or copies from object storage."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from features.atomic_files import lock
from features.errors import UserError
from features.object_storage import StoredObject
from pipeline.datasets.importers.base import Files
from pipeline.datasets.importers.messages import plural, quote_all
from pipeline.datasets.raw_files import RawFormat
from pipeline.media.raw_storage import LMDB_FILE, RawStorage, is_copy
from pipeline.media.references import CONTAINERS, relative_path


@dataclass(frozen=True, kw_only=True, slots=True)
class RawCopies:
    """The raw folder as importers see it."""

    root: Path
    """Folder on this machine. Objects that are not copied have empty files in it."""
    storage: RawStorage | None = None
    """The folder in object storage; None if the raw folder is on this machine."""

    @property
    def place(self) -> str:
        """The URL, or the absolute path of a folder on this machine."""
        return str(self.root.resolve()) if self.storage is None else self.storage.folder.url

    def fetch(self, files: Files) -> None:
        """Copy the files of the roles, so that importers can read them.

        Raises:
            UserError: The storage cannot be read.
        """
        if self.storage is None:
            return
        for path in (path for paths in files.values() for path in paths):
            if path.is_file() and path.is_relative_to(self.root):
                self.storage.fetch(path.relative_to(self.root).as_posix())


@dataclass(frozen=True, kw_only=True, slots=True)
class RawSource:
    """The raw files of a preparation."""

    copies: RawCopies
    files: Files
    layout: RawFormat
    k_core: int

    @property
    def root(self) -> Path:
        """The folder that importers read."""
        return self.copies.root

    @property
    def interactions(self) -> Path:
        """The file of interactions; that of items in a layout without users."""
        return next(iter((*self.files.get("interactions", ()), *self.files.get("items", ()))))

    @property
    def items(self) -> Path:
        """The file of items; that of interactions if the raw folder has none."""
        return next(iter((*self.files.get("items", ()), *self.files.get("interactions", ()))))


@contextmanager
def raw_copies(raw: Path | RawStorage, notify: Callable[[str], None]) -> Iterator[RawCopies]:
    """Yield the raw folder as importers see it; the empty files are removed afterwards.

    Tars and LMDBs are copied at once. Messages of errors name the URL in place of the copies.

    Raises:
        UserError: The storage cannot be read or holds no object; or another process prepares a
            dataset from the same folder.
    """
    if isinstance(raw, Path):
        yield RawCopies(root=raw)
        return
    url = raw.folder.url
    with lock(raw.copies / ".lock", f"the copies of {url}"):
        try:
            for name in _mirror(raw, notify):
                raw.fetch(name)
            yield RawCopies(root=raw.copies, storage=raw)
        except UserError as error:
            error.args = (str(error).replace(str(raw.copies), url),)
            raise
        finally:
            for path in _files(raw.copies):
                if not path.stat().st_size:
                    path.unlink()


def _mirror(raw: RawStorage, notify: Callable[[str], None]) -> list[str]:
    """Make an empty file for every object without a copy, and remove copies without an object.

    Return the names of the containers.
    """
    stale = set(_files(raw.copies))
    containers, nameless = [], []
    is_empty = True
    for stored in raw.folder.objects():
        is_empty = False
        if any(part.startswith(".") and part.strip(".") for part in stored.name.split("/")):
            continue  # importers leave hidden files out
        path = raw.copies / stored.name
        if not _is_path(raw.copies, stored.name):
            nameless.append(stored.name)
            continue
        stale.discard(path)
        _make_empty(path, stored, raw)
        if path.suffix.lower() in CONTAINERS or path.name == LMDB_FILE:
            containers.append(stored.name)
    if is_empty:
        raise UserError(f"{raw.folder.url} holds no object; correct the URL, or copy the raw files")
    if nameless:
        notify(
            f"{plural(len(nameless), 'object')} left out whose names are no paths of files (such as"
            f" {quote_all(sorted(nameless)[:3])})"
        )
    for path in stale:
        path.unlink()
    return containers


def _is_path(copies: Path, name: str) -> bool:
    """Return True if a name, which may be any text, is that of a file below a folder."""
    return "\0" not in name and relative_path(copies, name) == os.path.normpath(name) == name


def _make_empty(path: Path, stored: StoredObject, raw: RawStorage) -> None:
    if is_copy(path, stored):
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise UserError(
            f"{raw.folder.url}/{stored.name} is an object, and its name or a part of it is a folder"
            " as well; rename it"
        ) from None


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder that are not hidden."""
    for parent, children, names in os.walk(folder):
        children[:] = [name for name in children if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                yield Path(parent, name)
