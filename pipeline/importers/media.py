"""Pictures and clips of items: one listing of a folder, joined to the items in SQL."""

import os
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa

from pipeline.importers.lmdb_images import LmdbImages

IMAGES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm")
)
VIDEOS = frozenset(
    (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".3gp")
)


def list_media(
    db: duckdb.DuckDBPyConnection, root: Path, images: tuple[Path, ...], videos: tuple[Path, ...]
) -> None:
    """Make the tables ``images`` and ``videos`` (item_id, path), one row for each item id.

    The file's name without its ending is the item's id; in an LMDB, the key is. Of several files
    of one item, the first folder's wins, then the first in alphabetical order.
    """
    for table, folders, suffixes in (("images", images, IMAGES), ("videos", videos, VIDEOS)):
        ids: list[str] = []
        paths: list[str] = []
        for folder in folders:
            if folder.suffix == ".lmdb":
                place = os.path.relpath(folder, root)
                with LmdbImages(folder) as covers:
                    keys = list(covers.keys())
                ids.extend(keys)
                paths.extend(f"{place}#{key}" for key in keys)
                continue
            for path in _files(folder, suffixes):
                ids.append(os.path.splitext(os.path.basename(path))[0])
                paths.append(os.path.relpath(path, root))
        _create(db, table, ids, paths)


def _create(db: duckdb.DuckDBPyConnection, table: str, ids: list[str], paths: list[str]) -> None:
    listing = pa.table(
        {"item_id": pa.array(ids, pa.string()), "path": pa.array(paths, pa.string())}
    )
    db.register("_listing", listing)
    db.execute(
        f"CREATE TABLE {table} AS SELECT item_id, arg_min(path, place) AS path"
        " FROM (SELECT *, row_number() OVER () AS place FROM _listing) GROUP BY item_id"
    )
    db.unregister("_listing")


def _files(folder: Path, suffixes: frozenset[str]) -> Iterator[str]:
    for here, below, names in os.walk(folder):
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


def with_media_sql(items: str) -> str:
    """SQL of ``raw_items`` from (item_id, text, image, video, attributes) and the listings.

    A path that the items' file gives wins over a file that bears the item's id.
    """
    return (
        "SELECT i.item_id, i.text, coalesce(i.image, p.path) AS image,"
        " coalesce(i.video, v.path) AS video, i.attributes"
        f" FROM {items} i LEFT JOIN images p USING (item_id) LEFT JOIN videos v USING (item_id)"
    )
