"""What a reference to a picture or clip may name: a file below the raw root, or a part of one.

``covers/1.jpg``
    A file below the raw root.
``covers.tar#1.jpg``, ``covers.lmdb#1``
    A member of a tar, or a key of an LMDB.
``outside:/data/covers/1.jpg``
    A file (or a part of one) in a folder elsewhere that the user named by ``--file``.
``prepared:media/images.tar#5f0c...``
    A part of a file that ``mmrec prepare`` wrote into the dataset's own folder.

The last two come from us only; a table of items that uses them, or leaves the raw root, is refused.
"""

import os
from pathlib import Path
from typing import Literal

OUTSIDE = "outside:"
PREPARED = "prepared:"
CONTAINERS = (".tar", ".lmdb")
_LMDB_MAGIC = (16, b"\xde\xc0\xef\xbe")  # offset and bytes
_TAR_MAGIC = (257, b"ustar")


def inside(root: Path, path: str) -> str | None:
    """Give ``path`` relative to ``root``, or nothing when it leads elsewhere.

    Only the words count: a symbolic link below the root is the user's own doing.
    """
    if not path.startswith("/") and ".." not in path and "./" not in path:
        return path
    for base in dict.fromkeys((os.path.abspath(root), os.path.realpath(root))):
        tail = os.path.relpath(os.path.normpath(os.path.join(base, path)), base)
        if tail != ".." and not tail.startswith("../"):
            return tail
    return None


def settle(root: Path, reference: str) -> str | None:
    """Make a stranger's reference relative to ``root``; nothing when it leads elsewhere."""
    if reference.startswith((OUTSIDE, PREPARED)):
        return None
    path, mark, key = _parted(reference)
    tail = inside(root, path)
    return None if tail is None else tail + mark + key


def _parted(reference: str) -> tuple[str, str, str]:
    """Split a reference to a part of a container at the container's name."""
    lowered = reference.lower()
    ends = [lowered.find(f"{suffix}#") + len(suffix) for suffix in CONTAINERS if suffix in lowered]
    end = min((end for end in ends if lowered[end : end + 1] == "#"), default=len(reference))
    return reference[:end], reference[end : end + 1], reference[end + 1 :]


def container(path: Path) -> Literal["tar", "lmdb"] | None:
    """What kind of container ``path`` is, by its first bytes; nothing when it is another file."""
    try:
        if path.is_dir():
            return "lmdb" if (path / "data.mdb").is_file() else None
        if not path.is_file():
            return None
        with path.open("rb") as stream:
            start = stream.read(512)
    except (OSError, ValueError):  # ValueError: a name with a null character
        return None
    for kind, (offset, magic) in (("lmdb", _LMDB_MAGIC), ("tar", _TAR_MAGIC)):
        if start[offset : offset + len(magic)] == magic:
            return kind  # type: ignore[return-value]
    # Tars of before 1988 bear no mark.
    return "tar" if path.suffix.lower() == ".tar" else None
