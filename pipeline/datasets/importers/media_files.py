"""Images and videos in folders and containers: listed once, joined to the items in SQL."""

import os
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa

from features.errors import UserError
from pipeline.datasets.importers.base import Files, plural, quote_all
from pipeline.datasets.importers.raw_sql import fetch_row
from pipeline.media.lmdb import LmdbImages
from pipeline.media.references import OUTSIDE, container_kind, relative_path, relative_reference
from pipeline.media.tar import tar_members

_IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm")
)
_VIDEO_SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".3gp")
)
_ROLES = {"image": "images", "video": "videos"}
"""Column of ``described`` to the role of its files."""


def create_raw_items(db: duckdb.DuckDBPyConnection, root: Path, files: Files) -> tuple[str, ...]:
    """Create ``raw_items`` from ``described`` and the images and videos in folders and containers.

    A reference in the file of items wins over a file that is named by the item id.

    Args:
        db: A connection with the table ``described`` (item_id, text, image, video, attributes).
        root: The raw root, to which references are relative.
        files: The paths of each role. ``images`` and ``videos`` are listed, ``items`` is for
            messages.

    Returns:
        Messages for the user, one line each.

    Raises:
        UserError: A reference in the file of items leads outside the raw root, or a path of a role
            holds no images or videos.
    """
    db.create_function(
        "settle",
        lambda reference: relative_reference(root, reference) or "",
        ["VARCHAR"],
        "VARCHAR",
    )
    notes = []
    for column, role in _ROLES.items():
        _check_inside(db, root, files, column)
        _create_listing(db, root, role, files.get(role, ()))
        count, examples = fetch_row(
            db,
            f"SELECT count(*), list(item_id ORDER BY item_id)[:3] FROM {role}"
            " SEMI JOIN described USING (item_id) WHERE n > 1",
        )
        if count:
            notes.append(
                f"{plural(count, 'item')} with several {role} (such as {quote_all(examples)});"
                " the first by name is used"
            )
    db.execute(
        "CREATE TABLE raw_items AS SELECT i.item_id, i.text,"
        f" coalesce({_settled_sql('i.image')}, p.path) AS image,"
        f" coalesce({_settled_sql('i.video')}, v.path) AS video, i.attributes"
        " FROM described i LEFT JOIN images p USING (item_id) LEFT JOIN videos v USING (item_id)"
    )
    for column, role in _ROLES.items():
        count, examples = fetch_row(
            db,
            f"SELECT count(*), list(item_id ORDER BY item_id)[:3] FROM raw_items r"
            f" JOIN {role} f USING (item_id) WHERE r.{column} <> f.path",
        )
        if count:
            notes.append(
                f"{plural(count, 'item')} with {role} both in the table of items and among the"
                f" files (such as {quote_all(examples)}); those in the table are used"
            )
    return tuple(notes)


def _settled_sql(value: str) -> str:
    """Return SQL of a reference relative to the root; '' if the reference leads outside it."""
    # Only rows that may lead outside call the Python function.
    suspect = f"{value}[1] = '/' OR regexp_matches({value}, '[.]/|[.][.]|:')"
    return f"CASE WHEN {suspect} THEN settle({value}) ELSE {value} END"


def _check_inside(db: duckdb.DuckDBPyConnection, root: Path, files: Files, column: str) -> None:
    outside = db.sql(
        f"SELECT item_id, {column} FROM described WHERE {_settled_sql(column)} = '' LIMIT 1"
    ).fetchall()
    if outside:
        ((item, reference),) = outside
        source = files["items"][0] if files.get("items") else root
        raise UserError(
            f"{source}: the {column} {reference[:120]!r} of item {item!r} leads outside {root};"
            f" move it below that folder, or give its folder by --file {_ROLES[column]}=PATH"
        )


def _create_listing(
    db: duckdb.DuckDBPyConnection, root: Path, role: str, paths: tuple[Path, ...]
) -> None:
    """Create the table ``role`` (item_id, path, n) with one row for each item id.

    The item id is the name of a file without its suffix, also within a tar, or the key of an LMDB.
    If an item has several files (``n``), the first folder wins, then the first file by name.
    """
    listed = [entry for path in paths for entry in _list(root, role, path)]
    listing = pa.table(
        {
            "item_id": pa.array([item_id for item_id, _ in listed], pa.string()),
            "path": pa.array([reference for _, reference in listed], pa.string()),
        }
    )
    db.register("_listing", listing)
    db.execute(
        f"CREATE TABLE {role} AS SELECT item_id, arg_min(path, row) AS path, count(*) AS n"
        " FROM (SELECT *, row_number() OVER () AS row FROM _listing) GROUP BY item_id"
    )
    db.unregister("_listing")


def _list(root: Path, role: str, path: Path) -> Iterator[tuple[str, str]]:
    """Yield (item id, reference) of each file in a folder or container.

    Raises:
        UserError: ``path`` is neither a folder nor a container that the role can have.
    """
    base = _reference(root, path)
    kind = container_kind(path)
    if role == "videos" and (kind or not path.is_dir()):
        raise UserError(f"{path} is no folder; videos are read from files only, unpack it")
    if kind == "tar":
        for name in sorted(_image_names(path)):
            yield _item_id(name), f"{base}#{name}"
    elif kind == "lmdb" or path.suffix == ".lmdb":
        with LmdbImages(path) as images:
            yield from ((key, f"{base}#{key}") for key in list(images.keys()))
    elif path.is_dir():
        suffixes = _IMAGE_SUFFIXES if role == "images" else _VIDEO_SUFFIXES
        for file in _files(path, suffixes):
            yield _item_id(file), os.path.join(base, os.path.relpath(file, path))
    else:
        raise UserError(f"{path} is no folder, tar or LMDB; give one by --file {role}=PATH")


def _reference(root: Path, path: Path) -> str:
    """Return the reference of ``path``: relative if the path is below the root."""
    relative = relative_path(root, os.path.abspath(path))
    return relative if relative is not None else f"{OUTSIDE}{path.resolve()}"


def _item_id(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _image_names(path: Path) -> Iterator[str]:
    """Yield the images in a tar, without hidden ones and those in hidden folders."""
    for member in tar_members(path):
        parts = member.name.split("/")
        suffix = os.path.splitext(parts[-1])[1].lower()
        hidden = any(part.startswith(".") for part in parts)
        if suffix in _IMAGE_SUFFIXES and not hidden and _is_utf8(member.name):
            yield member.name


def _files(folder: Path, suffixes: frozenset[str]) -> Iterator[str]:
    """Yield the files below a folder; links to folders are followed, each folder once."""
    visited: set[tuple[int, int]] = set()
    for parent, children, names in os.walk(folder, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:
            children.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        children[:] = sorted(name for name in children if not name.startswith("."))
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower()
            # Item ids are UTF-8, so a name that is not cannot match one.
            if suffix in suffixes and not name.startswith(".") and _is_utf8(name):
                yield os.path.join(parent, name)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
