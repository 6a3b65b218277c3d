"""A raw folder in object storage (``mmrec prepare --raw s3://bucket/prefix``).

Images and videos stay there, and each is read when it is encoded. Tables, tars and LMDBs are copied
to this machine, because they are read in pieces. While a dataset is prepared, every other object
has an empty file of its name among the copies: importers list and name these files, and do not
read them.
"""

import io
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import filelock

from features.atomic_files import atomic_write
from features.object_storage import StorageFolder, StoredObject, is_storage_url
from features.warehouse import Warehouse

LMDB_FILE = "data.mdb"
"""File of an LMDB that is a folder."""


@dataclass(frozen=True, slots=True)
class RawStorage:
    """A raw folder in object storage, and the folder of copies of some of its files."""

    folder: StorageFolder
    copies: Path

    def resolve(self) -> "RawStorage":
        """Return the same folder with an absolute path of the copies."""
        return RawStorage(self.folder, self.copies.resolve())

    def fetch_container(self, name: str) -> None:
        """Copy a tar or an LMDB to this machine unless it is here; nothing if there is none.

        Args:
            name: Name of the file, or of the folder of an LMDB.

        Raises:
            UserError: The storage cannot be read.
        """
        for part in (name, f"{name}/{LMDB_FILE}"):
            if self.fetch(part):
                return

    def fetch(self, name: str) -> bool:
        """Copy an object to this machine; a copy of the same size and time stays.

        Returns:
            False if there is no such object.

        Raises:
            UserError: The storage cannot be read.
        """
        stored = self.folder.find(name)
        if stored is None:
            return False
        path = self.copies / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_name(f".{path.name}.lock")):  # of other workers
            if not is_copy(path, stored):
                with atomic_write(path) as temporary:
                    self.folder.download(name, temporary)
                os.utime(path, (stored.modified.timestamp(),) * 2)
        return True

    def open(self, name: str) -> io.BufferedReader:
        """Copy an object to a temporary file that has no name, and open it.

        Raises:
            FileNotFoundError: There is no such object.
            UserError: The storage cannot be read.
        """
        with tempfile.NamedTemporaryFile(prefix="mmrec-") as file:
            self.folder.download(name, Path(file.name))
            return Path(file.name).open("rb")


def is_copy(path: Path, stored: StoredObject) -> bool:
    """Return True if a file has the size and the time of an object."""
    try:
        status = path.stat()
    except OSError:
        return False
    return (status.st_size, status.st_mtime) == (stored.size, stored.modified.timestamp())


def raw_folder(warehouse: Warehouse, raw: str | Path) -> Path | RawStorage:
    """Return a raw folder: a path on this machine, or a folder in object storage.

    Raises:
        UserError: The URL is not that of a folder, or the extra for it is not installed.
    """
    if not is_storage_url(str(raw)):
        return Path(raw)
    folder = StorageFolder(str(raw))
    return RawStorage(folder, warehouse.copies_dir(folder.bucket, folder.prefix))
