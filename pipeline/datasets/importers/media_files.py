"""Pictures and clips of items: one listing of a folder or container, joined to the items in SQL."""

import os
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa

from features.errors import UserError
from pipeline.datasets.importers.base import Files, many, some
from pipeline.datasets.importers.raw_sql import one
from pipeline.media.lmdb import LmdbImages
from pipeline.media.references import OUTSIDE, container_kind, relative_path, relative_reference
from pipeline.media.tar import tar_members

IMAGES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm")
)
VIDEOS = frozenset(
    (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".3gp")
)
_KINDS = {"image": ("images", "pictures"), "video": ("videos", "clips")}  # role, and a word


def create_items(db: duckdb.DuckDBPyConnection, root: Path, files: Files) -> tuple[str, ...]:
    """Make ``raw_items`` of ``described`` and of the pictures and clips in folders and containers.

    Args:
        db: Where ``described`` (item_id, text, image, video, attributes) is.
        root: The raw root, to which references are relative.
        files: The roles ``images`` and ``videos`` are listed; ``items`` is named in messages.

    Returns:
        One line for each thing that the person who prepares should know.

    Raises:
        UserError: A reference of the items' file leads outside the raw root, or a role names
            something that holds no pictures or clips.
    """
    db.create_function(
        "settle",
        lambda reference: relative_reference(root, reference) or "",
        ["VARCHAR"],
        "VARCHAR",
    )
    notes = []
    for column, (role, word) in _KINDS.items():
        _check_inside(db, root, files, column)
        _list(db, root, role, files.get(role, ()))
        count, such = one(
            db,
            f"SELECT count(*), list(item_id ORDER BY item_id)[:3] FROM {role}"
            " SEMI JOIN described USING (item_id) WHERE n > 1",
        )
        if count:
            notes.append(
                f"{many(count, 'item')} with several {word} (such as {some(such)});"
                " of each, the first by name is taken"
            )
    # A reference that the items' file gives wins over a file that bears the item's id.
    db.execute(
        "CREATE TABLE raw_items AS SELECT i.item_id, i.text,"
        f" coalesce({_settled('i.image')}, p.path) AS image,"
        f" coalesce({_settled('i.video')}, v.path) AS video, i.attributes"
        " FROM described i LEFT JOIN images p USING (item_id) LEFT JOIN videos v USING (item_id)"
    )
    for column, (role, word) in _KINDS.items():
        count, such = one(
            db,
            f"SELECT count(*), list(item_id ORDER BY item_id)[:3] FROM raw_items r"
            f" JOIN {role} f USING (item_id) WHERE r.{column} <> f.path",
        )
        if count:
            notes.append(
                f"{many(count, 'item')} with {word} both named by the table of items and found"
                f" among the files (such as {some(such)}); the table's are taken"
            )
    return tuple(notes)


def _settled(value: str) -> str:
    """SQL of a reference relative to the root, '' when it leads elsewhere."""
    # The condition spares nearly all rows the way through Python.
    odd = f"{value}[1] = '/' OR regexp_matches({value}, '[.]/|[.][.]|:')"
    return f"CASE WHEN {odd} THEN settle({value}) ELSE {value} END"


def _check_inside(db: duckdb.DuckDBPyConnection, root: Path, files: Files, column: str) -> None:
    found = db.sql(
        f"SELECT item_id, {column} FROM described WHERE {_settled(column)} = '' LIMIT 1"
    ).fetchall()
    if found:
        ((item, reference),) = found
        source = files["items"][0] if files.get("items") else root
        role, _ = _KINDS[column]
        raise UserError(
            f"{source}: the {column} {reference[:120]!r} of item {item!r} leads outside {root};"
            f" put it below that folder, or name its folder by --file {role}=PATH"
        )


def _list(db: duckdb.DuckDBPyConnection, root: Path, role: str, places: tuple[Path, ...]) -> None:
    """Make the table ``role`` (item_id, path, n), one row for each item id.

    A file's name without its ending is the item's id, also within a tar; in an LMDB the key is.
    Of the ``n`` files of one item, the first folder's wins, then the first in alphabetical order.
    """
    ids: list[str] = []
    paths: list[str] = []
    for place in places:
        base = _reference(root, place)
        kind = container_kind(place)
        if role == "videos" and (kind or not place.is_dir()):
            raise UserError(f"{place} is no folder; clips are read from files only, unpack it")
        if kind == "tar":
            for name in sorted(_names(place)):
                ids.append(_id(name))
                paths.append(f"{base}#{name}")
        elif kind == "lmdb" or place.suffix == ".lmdb":
            with LmdbImages(place) as covers:
                keys = list(covers.keys())
            ids.extend(keys)
            paths.extend(f"{base}#{key}" for key in keys)
        elif place.is_dir():
            for path in _files(place, IMAGES if role == "images" else VIDEOS):
                ids.append(_id(path))
                paths.append(os.path.join(base, os.path.relpath(path, place)))
        else:
            raise UserError(f"{place} is no folder, tar or LMDB; give one by --file {role}=PATH")
    listing = pa.table(
        {"item_id": pa.array(ids, pa.string()), "path": pa.array(paths, pa.string())}
    )
    db.register("_listing", listing)
    db.execute(
        f"CREATE TABLE {role} AS SELECT item_id, arg_min(path, place) AS path, count(*) AS n"
        " FROM (SELECT *, row_number() OVER () AS place FROM _listing) GROUP BY item_id"
    )
    db.unregister("_listing")


def _reference(root: Path, place: Path) -> str:
    """What stands for ``place`` in references: relative where it is below the root."""
    found = relative_path(root, os.path.abspath(place))
    return found if found is not None else f"{OUTSIDE}{place.resolve()}"


def _id(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _names(path: Path) -> Iterator[str]:
    """The pictures of a tar; hidden ones and those in hidden folders do not count."""
    for member in tar_members(path):
        parts = member.name.split("/")
        suffix = os.path.splitext(parts[-1])[1].lower()
        hidden = any(part.startswith(".") for part in parts)
        if suffix in IMAGES and not hidden and _is_utf8(member.name):
            yield member.name


def _files(folder: Path, suffixes: frozenset[str]) -> Iterator[str]:
    """The files below a folder, through links to folders, each folder once."""
    seen: set[tuple[int, int]] = set()
    for here, below, names in os.walk(folder, followlinks=True):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower()
            # A name that is not UTF-8 can be no item's id.
            if suffix in suffixes and not name.startswith(".") and _is_utf8(name):
                yield os.path.join(here, name)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
