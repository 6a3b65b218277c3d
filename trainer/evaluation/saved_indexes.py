"""Trained indexes in the folder of a run, which are used again for the same vectors."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from features.atomic_files import atomic_write
from features.checksums import EMPTY_CHECKSUM, ChangedBytesError, seal, verify
from features.errors import UserError

INDEXES = "indexes"
"""Folder of the trained indexes, in a run's folder."""
_MOST = 4  # files that stay in a folder


class SavedIndexes:
    """A folder of trained FAISS indexes, one file for each.

    A file contains the fingerprint of the vectors and parameters that the index was trained on, a
    checksum, and the index in FAISS's own format. Other weights or another catalogue give other
    vectors, and so another fingerprint. The latest four files stay. The files only save time: a
    damaged file is replaced, and a folder that cannot be written is left as it is.

    Args:
        folder: The folder; it is created when the first index is saved.
        on_stage: Called with one line before an index is trained, and if one cannot be saved.
    """

    def __init__(self, folder: Path, on_stage: Callable[[str], object] = lambda stage: None):
        self.folder = folder
        self._on_stage = on_stage

    def load(self, name: str, fingerprint: str) -> Any | None:
        """Return the index that was saved under this name and fingerprint, if it is intact."""
        import faiss

        path = self._path(name, fingerprint)
        with suppress(ChangedBytesError, OSError, RuntimeError):
            if path.is_file() and verify(path) is not None:
                with path.open("rb") as stream:
                    if stream.readline().startswith(_header(fingerprint)):
                        path.touch()
                        return faiss.read_index(_reader(stream))
        self._on_stage(f"training the index {name}")
        return None

    def save(self, name: str, fingerprint: str, index: Any) -> None:
        """Write an index, complete or not at all, and remove the oldest files."""
        import faiss

        try:
            with atomic_write(self._path(name, fingerprint)) as temporary:
                with temporary.open("wb") as stream:
                    stream.write(_header(fingerprint) + f" {EMPTY_CHECKSUM}\n".encode())
                    faiss.write_index(index, _writer(stream))
                seal(temporary)
            files = sorted(self.folder.glob("*.faiss"), key=lambda path: path.stat().st_mtime_ns)
            for path in files[:-_MOST]:
                path.unlink(missing_ok=True)
        except (OSError, RuntimeError, UserError) as error:
            self._on_stage(f"the index is not saved in {self.folder} ({error})")

    def _path(self, name: str, fingerprint: str) -> Path:
        return self.folder / f"{name}-{fingerprint}.faiss"


def _header(fingerprint: str) -> bytes:
    return f"mmrec index {fingerprint}".encode()


def _reader(stream: BinaryIO) -> Any:
    """Return FAISS's reader of the rest of an open file."""
    import faiss

    return faiss.PyCallbackIOReader(stream.read)  # type: ignore[attr-defined]


def _writer(stream: BinaryIO) -> Any:
    """Return FAISS's writer to the end of an open file."""
    import faiss

    return faiss.PyCallbackIOWriter(stream.write)  # type: ignore[attr-defined]
