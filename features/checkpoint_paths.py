"""Check that the documents of a checkpoint name no path out of its folder."""

import json
from pathlib import Path, PurePosixPath, PureWindowsPath

from features.errors import UserError


def named_path(folder: Path, document: str, path: str) -> Path:
    """Return the path that a document of a checkpoint names, unless it leads out of the folder.

    In the cache of the hub, files are links into the folder ``blobs`` of their repository. Such
    links are allowed.

    Args:
        folder: Folder of the checkpoint.
        document: Name of the document in the folder, for messages.
        path: Path in the document, relative to the folder; an empty path is the folder.

    Raises:
        UserError: The path is absolute, has a part ``..``, or is a link out of the folder.
    """
    is_relative = not PurePosixPath(path).is_absolute() and not PureWindowsPath(path).anchor
    if is_relative and ".." not in PureWindowsPath(path).parts and "\0" not in path:
        target = (folder / path).resolve()
        if any(target.is_relative_to(root) for root in _roots(folder)):
            return folder / path
    raise UserError(
        f"{folder / document} names the path {path!r}, which leads out of the"
        " folder; put the files into the folder, and name them relative to it"
    )


def check_shards(folder: Path) -> None:
    """Check the names of weights in every ``*.index.json`` of a folder, see :func:`named_path`.

    Documents of another form are left to the library that reads them.

    Raises:
        UserError: A name leads out of the folder.
    """
    for index in sorted(folder.glob("*.index.json")):
        document = json.loads(index.read_text(encoding="utf-8"))
        shards = document.get("weight_map") if isinstance(document, dict) else None
        if isinstance(shards, dict):
            for shard in sorted({str(value) for value in shards.values()}):
                named_path(folder, index.name, shard)


def _roots(folder: Path) -> list[Path]:
    """Return the folders that may hold the files of a checkpoint."""
    resolved = folder.resolve()
    roots = [resolved]
    for parent in resolved.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            roots.append(parent.parent / "blobs")
    return roots
