"""References to images and videos: a file below the folder of raw files, or a part of one.

``covers/1.jpg``
    A file below the raw folder.
``covers.tar#1.jpg``, ``covers.lmdb#1``
    A member of a tar, or a key of an LMDB.
``outside:/data/covers/1.jpg``
    A file (or a part of one) in another folder that the user named by ``--file``.
``prepared:media/images.tar#5f0c...``
    A part of a file that ``mmrec prepare`` wrote into the dataset's own folder.

Only mmrec itself writes the last two. A table of items that uses them, or that leaves the raw
folder, is refused.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from unicodedata import normalize
from urllib.parse import unquote, urlsplit

OUTSIDE = "outside:"
PREPARED = "prepared:"
CONTAINERS = (".tar", ".lmdb")
_LMDB_MAGIC = (16, b"\xde\xc0\xef\xbe")  # offset and bytes
_TAR_MAGIC = (257, b"ustar")


def member_name(data: bytes) -> str:
    """Return the name of an image in the tar that ``mmrec prepare`` writes: a hash of its bytes."""
    return hashlib.sha256(data).hexdigest()[:32]


def relative_path(root: Path, path: str) -> str | None:
    """Return ``path`` relative to ``root``, or None if it leads out of ``root``.

    Only the text of the path is checked. The user may have put symbolic links below the root.
    """
    if not path.startswith("/") and ".." not in path and "./" not in path:
        return path
    for base in dict.fromkeys((os.path.abspath(root), os.path.realpath(root))):
        tail = os.path.relpath(os.path.normpath(os.path.join(base, path)), base)
        if tail != ".." and not tail.startswith("../"):
            return tail
    return None


def relative_reference(root: Path, reference: str) -> str | None:
    """Return a reference from raw data relative to ``root``, or None if it leads out of it."""
    if reference.startswith((OUTSIDE, PREPARED)):
        return None
    path, mark, key = _split_container(reference)
    tail = relative_path(root, path)
    return None if tail is None else tail + mark + key


def is_url(reference: str) -> bool:
    """Return True for a URL of a scheme other than ``file``."""
    scheme, mark, _ = reference.strip().partition("://")
    return bool(mark) and scheme.isalnum() and scheme.lower() != "file"


def spellings(reference: str) -> Iterator[str]:
    """Yield the reference as it is, then the other spellings under which its file may exist.

    These are the reference without outer blanks, a ``file:`` URL as a path, slashes for
    backslashes, both forms of composed letters of Unicode, and the suffix in another case.
    """
    yield reference
    path = reference.strip()
    if path.lower().startswith("file:"):
        path = unquote(urlsplit(path).path)
    for slashed in dict.fromkeys((path, path.replace("\\", "/"))):
        stem, suffix = os.path.splitext(slashed)
        for cased in dict.fromkeys((suffix, suffix.lower(), suffix.upper())):
            name = stem + cased
            yield from (name, normalize("NFC", name), normalize("NFD", name))


def _split_container(reference: str) -> tuple[str, str, str]:
    """Split a reference after the name of a container: (path, ``#`` or empty, key)."""
    lowered = reference.lower()
    ends = [lowered.find(f"{suffix}#") + len(suffix) for suffix in CONTAINERS if suffix in lowered]
    end = min((end for end in ends if lowered[end : end + 1] == "#"), default=len(reference))
    return reference[:end], reference[end : end + 1], reference[end + 1 :]


def container_kind(path: Path) -> Literal["tar", "lmdb"] | None:
    """Return the kind of container by the file's first bytes, or None for another file."""
    try:
        if path.is_dir():
            return "lmdb" if (path / "data.mdb").is_file() else None
        if not path.is_file():
            return None
        with path.open("rb") as stream:
            start = stream.read(512)
    except PermissionError:  # opening the container gives the right error
        return {".lmdb": "lmdb", ".tar": "tar"}.get(path.suffix.lower())  # type: ignore[return-value]
    except (OSError, ValueError):  # ValueError: a name with a null character
        return None
    for kind, (offset, magic) in (("lmdb", _LMDB_MAGIC), ("tar", _TAR_MAGIC)):
        if start[offset : offset + len(magic)] == magic:
            return kind  # type: ignore[return-value]
    # Tars of before 1988 have no magic bytes.
    return "tar" if path.suffix.lower() == ".tar" else None
