"""Images and videos in folders and containers: listed once, joined to the items in SQL."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from unicodedata import normalize

import duckdb
import pyarrow as pa

from features.errors import UserError
from pipeline.datasets.importers.base import Files
from pipeline.datasets.importers.messages import plural, quote_all
from pipeline.datasets.importers.raw_sql import fetch_row
from pipeline.datasets.importers.reference_columns import ROLES, create_references
from pipeline.media.lmdb import LmdbImages
from pipeline.media.references import OUTSIDE, container_kind, relative_path
from pipeline.media.tar import tar_members

_IMAGE_SUFFIXES = frozenset(
    (
        ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".jpx", ".png", ".apng", ".webp", ".gif",
        ".bmp", ".dib", ".tif", ".tiff", ".avif", ".heic", ".heif", ".ppm", ".pgm", ".pnm", ".tga",
    )
)  # fmt: skip
_VIDEO_SUFFIXES = frozenset(
    (
        ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".mpe", ".ts", ".mts",
        ".m2ts", ".flv", ".f4v", ".wmv", ".ogv", ".3gp",
    )
)  # fmt: skip
_Kind = Literal["media", "other", "link"]


def create_raw_items(
    db: duckdb.DuckDBPyConnection, root: Path, files: Files, *, image_names: str | None = None
) -> tuple[str, ...]:
    """Create ``raw_items`` from ``described`` and the images and videos in folders and containers.

    A reference in the file of items wins over a file that is named by the item id. The rows keep
    the order of ``described`` if an item has several rows or a row no id.

    Args:
        db: A connection with the table ``described`` (item_id, text, image, video, attributes).
        root: The raw root, to which references are relative.
        files: The paths of each role; ``images`` and ``videos`` are listed.
        image_names: A table (item_id, name) of further names that files of images may have, the
            best name of an item first. A file that is named by the item id wins.

    Returns:
        Messages for the user, one line each.

    Raises:
        UserError: A path of a role holds no images or videos.
    """
    notes: list[str] = []
    for column, role in ROLES.items():
        notes += create_references(db, root, column)
        notes += _create_listing(db, root, role, files.get(role, ()))
        if role == "images" and image_names is not None:
            _rename_images(db, image_names)
        notes += _listing_notes(db, role, f"{column}_references")
        notes += _other_notes(db, role)
    # A join need not keep the order of the file, which decides between rows of one item.
    (is_listed_once,) = fetch_row(
        db, "SELECT count(*) = count(DISTINCT nullif(item_id, '')) FROM described"
    )
    order = "" if is_listed_once else " ORDER BY i.rowid"
    # The names of files on macOS have composed letters in another form than most ids.
    named = "item_id = nfc_normalize(i.item_id)"
    db.execute(
        "CREATE TABLE raw_items AS SELECT i.item_id, i.text,"
        " coalesce(a.path, p.path) AS image, coalesce(b.path, v.path) AS video, i.attributes"
        " FROM described i"
        " LEFT JOIN image_references a ON a.reference = i.image"
        " LEFT JOIN video_references b ON b.reference = i.video"
        f" LEFT JOIN images p ON p.{named} LEFT JOIN videos v ON v.{named}{order}"
    )
    for column, role in ROLES.items():
        count, examples = fetch_row(
            db,
            f"SELECT count(*), list(r.item_id ORDER BY r.item_id)[:3] FROM raw_items r"
            f" JOIN {role} f ON f.item_id = nfc_normalize(r.item_id) WHERE r.{column} <> f.path",
        )
        if count:
            notes.append(
                f"{plural(count, 'item')} with {role} both in the table of items and among the"
                f" files (such as {quote_all(examples)}); those in the table are used"
            )
    return tuple(notes)


def _listing_notes(db: duckdb.DuckDBPyConnection, role: str, references: str) -> Iterator[str]:
    """Yield messages about items with several files, and files without an item.

    Args:
        db: A connection with the table of the role.
        role: ``images`` or ``videos``.
        references: Table of the files that the table of items names by their paths.
    """
    ids = "SELECT nfc_normalize(item_id) AS item_id FROM described"
    count, examples = fetch_row(
        db,
        f"SELECT count(*), list(item_id ORDER BY item_id)[:3] FROM {role}"
        f" SEMI JOIN ({ids}) USING (item_id) WHERE n > 1",
    )
    if count:
        yield (
            f"{plural(count, 'item')} with several {role} (such as {quote_all(examples)});"
            " the first by name is used"
        )
    total, count, examples = fetch_row(
        db,
        f"SELECT (SELECT sum(n) FROM {role}), sum(n), list(path ORDER BY path)[:3] FROM {role}"
        f" ANTI JOIN ({ids}) USING (item_id) ANTI JOIN {references} USING (path)",
    )
    if count:
        yield (
            f"{count} of {plural(total, 'file')} in {role} fit no item (such as"
            f" {quote_all(examples)}); a file is named by its item id"
        )


def _other_notes(db: duckdb.DuckDBPyConnection, role: str) -> Iterator[str]:
    """Yield a message about items whose only file has an ending that is not of the role."""
    count, examples = fetch_row(
        db,
        f"SELECT count(DISTINCT item_id), list(path ORDER BY path)[:3] FROM {role}_others"
        " SEMI JOIN (SELECT nfc_normalize(item_id) AS item_id FROM described) USING (item_id)"
        f" ANTI JOIN {role} USING (item_id)",
    )
    if count:
        yield (
            f"{plural(count, 'item')} with a file in {role} whose ending is not that of"
            f" {role} (such as {quote_all(examples)}); rename the files, for example to"
            f" {'.jpg' if role == 'images' else '.mp4'}"
        )


def _create_listing(
    db: duckdb.DuckDBPyConnection, root: Path, role: str, paths: tuple[Path, ...]
) -> list[str]:
    """Create the table ``role`` (item_id, path, n) with one row for each item id.

    Return a message about links without a file.

    ``<role>_others`` (item_id, path) has the files of other endings that an item id may name: the
    item id is their name with and without the ending.

    The item id is the name of a file without its suffix, also within a tar, or the key of an LMDB.
    If an item has several files (``n``), the first folder wins, then the first file by name.
    """
    listed: list[tuple[str, str]] = []
    others: list[tuple[str, str]] = []
    dangling: list[str] = []
    for path in paths:
        for name, reference, kind in _list(root, role, path):
            if kind == "link":
                dangling.append(reference)
            elif kind == "media":
                listed.append((name, reference))
            else:
                names = {_item_id(name), normalize("NFC", os.path.basename(name))}
                others += [(item_id, reference) for item_id in sorted(names)]
    db.register("_others", _reference_table(others))
    db.execute(f"CREATE TABLE {role}_others AS FROM _others")
    db.unregister("_others")
    db.register("_listing", _reference_table(listed))
    db.execute(
        f"CREATE TABLE {role} AS SELECT item_id, arg_min(path, row) AS path, count(*) AS n"
        " FROM (SELECT *, row_number() OVER () AS row FROM _listing) GROUP BY item_id"
    )
    db.unregister("_listing")
    if not dangling:
        return []
    return [
        f"{plural(len(dangling), 'link')} in {role} without a file (such as"
        f" {quote_all(sorted(dangling)[:3])}); put the files that the links name into the same tar"
        " or folder"
    ]


def _rename_images(db: duckdb.DuckDBPyConnection, names: str) -> None:
    """Give the files in ``images`` that have a name of an item the id of the item."""
    db.execute(
        "CREATE TABLE _renamed AS SELECT nfc_normalize(a.item_id) AS item_id, path, n, name"
        f" FROM (SELECT *, row_number() OVER () AS row FROM {names}) a"
        " JOIN images i ON i.item_id = a.name"
        " QUALIFY row_number() OVER (PARTITION BY a.item_id ORDER BY row) = 1"
    )
    db.execute(
        "DELETE FROM images WHERE item_id IN (SELECT name FROM _renamed)"
        " AND item_id NOT IN (SELECT nfc_normalize(item_id) FROM described)"
    )
    db.execute(
        "INSERT INTO images SELECT item_id, path, n FROM _renamed ANTI JOIN images USING (item_id)"
    )
    db.execute("DROP TABLE _renamed")


def _reference_table(pairs: list[tuple[str, str]]) -> pa.Table:
    return pa.table(
        {
            "item_id": pa.array([item_id for item_id, _ in pairs], pa.string()),
            "path": pa.array([reference for _, reference in pairs], pa.string()),
        }
    )


def _list(root: Path, role: str, path: Path) -> Iterator[tuple[str, str, _Kind]]:
    """Yield (item id, reference, "media") of each file in a folder or container.

    A file whose ending is neither that of an image nor of a video is (name, reference, "other"),
    and a link that leads to no file is (name, reference, "link").

    Raises:
        UserError: ``path`` is neither a folder nor a container that the role can have.
    """
    base = _reference(root, path)
    kind = container_kind(path)
    if role == "videos" and (kind or not path.is_dir()):
        raise UserError(f"{path} is not a folder; videos are read from files only, unpack it")
    if kind == "tar":
        for name, member in sorted(_image_names(path)):
            yield _item_id(name) if member == "media" else name, f"{base}#{name}", member
    elif kind == "lmdb" or path.suffix.lower() == ".lmdb":
        with LmdbImages(path) as images:
            for key in list(images.keys()):
                yield normalize("NFC", key), f"{base}#{key}", "media"
    elif path.is_dir():
        suffixes = _IMAGE_SUFFIXES if role == "images" else _VIDEO_SUFFIXES
        for file, file_kind in _files(path, suffixes):
            reference = os.path.join(base, os.path.relpath(file, path))
            yield _item_id(file) if file_kind == "media" else file, reference, file_kind
    else:
        raise UserError(f"{path} is not a folder, tar or LMDB; give one by --file {role}=PATH")


def _reference(root: Path, path: Path) -> str:
    """Return the reference of ``path``: relative if the path is below the root."""
    relative = relative_path(root, os.path.abspath(path))
    return relative if relative is not None else f"{OUTSIDE}{path.resolve()}"


def _item_id(path: str) -> str:
    return normalize("NFC", os.path.splitext(os.path.basename(path))[0])


def _image_names(path: Path) -> Iterator[tuple[str, _Kind]]:
    """Yield (name, kind) of the images, links without a file and other files in a tar.

    Hidden files and those in hidden folders are left out.
    """
    for member in tar_members(path):
        parts = member.name.split("/")
        suffix = os.path.splitext(parts[-1])[1].lower()
        hidden = any(part.startswith(".") for part in parts)
        is_image = suffix in _IMAGE_SUFFIXES
        if (is_image or suffix not in _VIDEO_SUFFIXES) and not hidden and _is_utf8(member.name):
            if member.offset is None and is_image:
                yield member.name, "link"
            elif member.offset is not None:
                yield member.name, "media" if is_image else "other"


def _files(folder: Path, suffixes: frozenset[str]) -> Iterator[tuple[str, _Kind]]:
    """Yield (path, kind) of the files below a folder; those of unknown endings are "other".

    Links to folders are followed, each folder once. Hidden files are left out.
    """
    visited: set[tuple[int, int]] = set()
    for parent, children, names in os.walk(folder, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:
            children.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        children[:] = sorted(name for name in children if not name.startswith("."))
        with os.scandir(parent) as entries:
            links = {entry.name for entry in entries if entry.is_symlink()}
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower()
            is_other = suffix not in _IMAGE_SUFFIXES | _VIDEO_SUFFIXES
            # Item ids are UTF-8, so a name that is not cannot match one.
            if not (suffix in suffixes or is_other) or name.startswith(".") or not _is_utf8(name):
                continue
            file = os.path.join(parent, name)
            if suffix in suffixes and name in links and not os.path.exists(file):
                yield file, "link"
            else:
                yield file, "media" if suffix in suffixes else "other"


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
