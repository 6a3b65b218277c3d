"""Importer of Amazon reviews as released in 2014, 2018 and 2023.

Interactions are ratings or reviews. Ratings are a CSV without a header: ``user,item,rating,time``
in ``ratings_*.csv`` (2014), ``item,user,rating,time`` (2018). Those of 2023 have a header. Reviews
are a dictionary for each line. Every rating is a positive interaction; repeated ones are kept.

Items are ``meta_*``, a dictionary for each line: literals of Python (2014), or JSON (2018, 2023).
The text of an item is its title and its description without HTML. Of several lines of an item, the
first counts. The columns ``brand`` (2023: ``store``), ``categories`` (2018: ``category``),
``price`` and others are attributes with the types that the file has.

Images are files named by the item id (asin), or by the base name of one of the item's image URLs.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any
from unicodedata import normalize
from urllib.parse import unquote, urlsplit

import duckdb
import pyarrow as pa

from features.errors import UserError
from pipeline.datasets.importers.base import (
    IMAGE_PATTERNS,
    VIDEO_PATTERNS,
    Files,
    Importer,
    ImportResult,
)
from pipeline.datasets.importers.dict_lines import (
    open_bytes,
    read_dicts,
    to_json,
    valid_text,
)
from pipeline.datasets.importers.interactions import Times, create_interactions
from pipeline.datasets.importers.items import create_described_from_ids
from pipeline.datasets.importers.media_files import create_raw_items
from pipeline.datasets.importers.messages import name_others, plural
from pipeline.datasets.importers.raw_sql import (
    MAX_LINE,
    delimited_sql,
    fetch_row,
    find_columns,
)
from pipeline.datasets.importers.text_sql import clean_sql, unescape_entities

BATCH = 20_000  # lines that become one Arrow table
_ITEM = ("parent_asin", "asin")
_USER = ("user_id", "reviewerID")
_TIME = ("timestamp", "sort_timestamp", "unixReviewTime")
_RENAMED = {"store": "brand", "category": "categories"}
_IMAGES = ("imUrl", "imageURLHighRes", "imageURL", "images")
_DROPPED = {
    *_ITEM, *_IMAGES, "description", "videos", "related", "also_buy", "also_view",
    "bought_together", "similar_item", "tech1", "tech2",
}  # fmt: skip
"""Columns that are no attributes: ids, media, the description (part of the text), other items."""
_TAG = re.compile(
    r"<!--.*?-->|<(script|style)\b.*?</\1\s*>|</?[A-Za-z!][^<>]{0,2000}>", re.DOTALL | re.IGNORECASE
)
_ITEMS = pa.schema(
    [(name, pa.string()) for name in ("item_id", "title", "description", "attributes")]
)
_NAMES = pa.schema([("item_id", pa.string()), ("name", pa.string())])
_INTERACTIONS = pa.schema(
    [("user_id", pa.string()), ("item_id", pa.string()), ("time", pa.string())]
)


def read(db: duckdb.DuckDBPyConnection, root: Path, files: Files) -> ImportResult:
    """Read ratings or reviews and, if the file is present, the metadata of the items.

    Raises:
        UserError: A file is damaged or has another layout.
    """
    notes: tuple[str, ...] = ()
    if files.get("items"):
        notes = _create_items(db, files["items"][0])
    path = files["interactions"][0]
    if re.search(r"\.csv(\.gz)?$", path.name.lower()):
        times = _create_from_ratings(db, path, bool(notes))
    else:
        times = _create_from_reviews(db, path)
    notes += times.notes
    if not files.get("items"):
        create_described_from_ids(db)
        notes += create_raw_items(db, root, files)
        return ImportResult(timestamps=True, time_unit=times.unit, notes=notes)
    notes += create_raw_items(db, root, files, image_names="image_names")
    urls, files_of_urls = fetch_row(
        db,
        "SELECT count(*), count(image) FROM raw_items"
        " SEMI JOIN (SELECT item_id FROM image_names) USING (item_id)",
    )
    if urls:
        notes += (
            f"of {plural(urls, 'item')} with the URL of an image, {files_of_urls} have a file",
        )
    return ImportResult(timestamps=True, time_unit=times.unit, notes=notes)


# -- interactions ---------------------------------------------------------------------------


def _create_from_ratings(db: duckdb.DuckDBPyConnection, path: Path, has_items: bool) -> Times:
    """Create ``raw_interactions`` from a CSV of ratings, with or without a header."""
    with open_bytes(path) as stream:
        first = stream.readline(MAX_LINE).decode("utf-8-sig", "replace").strip()
    names = [name.strip().strip('"') for name in first.split(",")]
    has_header = any(name in names for name in (*_ITEM, *_USER))
    if not has_header:
        if first and len(names) != 4:
            raise UserError(
                f"{path}, line 1: {plural(len(names), 'column')} where user, item, rating and time"
                " are expected; correct the file, or give another by --file interactions=PATH"
            )
        names = ["user_id", "asin", "rating", "timestamp"]
    source = delimited_sql(path, names, delimiter=",", header=has_header, quote='"')
    user, item, time = find_columns(path, names, _USER, _ITEM, _TIME)
    times = create_interactions(db, path, source, user=user, item=item, time=time)
    if has_header or not has_items:
        return times
    first_is_item, second_is_item = fetch_row(
        db,
        "SELECT count(*) FILTER (WHERE user_id IN (SELECT item_id FROM described)),"
        " count(*) FILTER (WHERE item_id IN (SELECT item_id FROM described)) FROM raw_interactions",
    )
    if first_is_item > second_is_item:  # the order of columns of 2018
        db.execute(
            "CREATE OR REPLACE TABLE raw_interactions AS SELECT item_id AS user_id,"
            " user_id AS item_id, timestamp, ordinal FROM raw_interactions"
        )
    return times


def _create_from_reviews(db: duckdb.DuckDBPyConnection, path: Path) -> Times:
    """Create ``raw_interactions`` from a dictionary for each review."""
    rows = (
        {
            "user_id": _text_of(review, _USER),
            "item_id": _text_of(review, _ITEM),
            "time": _text_of(review, _TIME),
        }
        for _, review in read_dicts(path)
    )
    _create_from_rows(db, "_reviews", rows, _INTERACTIONS)
    times = create_interactions(db, path, "_reviews", user="user_id", item="item_id", time="time")
    db.execute("DROP TABLE _reviews")
    return times


def _text_of(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """Return the first of the named values that is present, as text."""
    value = next((row[name] for name in names if row.get(name) is not None), None)
    return None if value is None else valid_text(str(value))


# -- items ----------------------------------------------------------------------------------


def _create_items(db: duckdb.DuckDBPyConnection, path: Path) -> tuple[str, ...]:
    """Create ``described`` and ``image_names`` (item_id, name) from metadata; return messages."""
    _create_from_rows(db, "_items", _item_rows(path), _ITEMS)
    names = (
        {"item_id": _text_of(item, _ITEM), "name": name}
        for _, item in read_dicts(path)
        for name in _image_names(item)
    )
    _create_from_rows(db, "image_names", names, _NAMES)
    lines, items, broken = fetch_row(
        db,
        "SELECT count(*), count(DISTINCT item_id), count(*) FILTER (WHERE title IS NULL)"
        " FROM _items",
    )
    text = f"nullif(concat_ws('. ', {clean_sql('title')}, {clean_sql('description')}), '')"
    db.execute(
        f"CREATE TABLE described AS SELECT item_id, {text} AS text, NULL::VARCHAR AS image,"
        " NULL::VARCHAR AS video, attributes FROM (SELECT *, row_number() OVER () AS row"
        " FROM _items) QUALIFY row_number() OVER (PARTITION BY item_id ORDER BY row) = 1"
        " ORDER BY row"
    )
    db.execute("DROP TABLE _items")
    notes = [f"{plural(items, 'item')} in {path.name}, {broken} of the lines without a title"]
    if lines > items:
        notes.append(f"{plural(lines - items, 'line')} of items that are listed before; left out")
    return tuple(notes)


def _item_rows(path: Path) -> Iterator[dict[str, str | None]]:
    """Yield the row of ``_items`` of each line of metadata.

    Raises:
        UserError: Lines have no asin.
    """
    without: list[int] = []
    for number, item in read_dicts(path):
        identifier = _text_of(item, _ITEM)
        if not identifier:
            without.append(number)
        elif not without:
            yield _item_row(identifier, item)
    if without:
        others = name_others(len(without), [number - 1 for number in without[:3]], "line")
        raise UserError(
            f"{path}, line {without[0]}: no asin or parent_asin{others}; add it, or remove the line"
        )


def _item_row(identifier: str, item: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the row of ``_items`` of a dictionary of metadata."""
    title = _plain_text(item.get("title"))
    # Some titles of 2018 are scripts of the page; its authors recommend this test.
    is_script = title is not None and "getTime" in title
    attributes = {
        _RENAMED.get(name, name): value
        for name, value in item.items()
        if name not in _DROPPED
        and value not in (None, "", [], {})
        # The column of the new name wins over the renamed one.
        and not (name in _RENAMED and item.get(_RENAMED[name]))
    }
    if is_script or title is None:
        attributes.pop("title", None)
    return {
        "item_id": identifier,
        "title": None if is_script else title,
        "description": _plain_text(item.get("description")),
        "attributes": to_json(attributes),
    }


def _plain_text(value: Any) -> str | None:
    """Return a text, or a list of texts joined by spaces, without HTML; None if it is empty."""
    if isinstance(value, list | tuple):
        value = " ".join(str(part) for part in value if part is not None)
    if value is None:
        return None
    # A second pass removes tags that were written as entities.
    for _ in range(2):
        value = unescape_entities(_TAG.sub(" ", str(value)))
    return valid_text(" ".join(value.split())) or None


def _image_names(item: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names, without ending, that files of the item's images may have, the best first."""
    for url in _urls([item.get(name) for name in _IMAGES]):
        base = normalize("NFC", unquote(urlsplit(url).path).rpartition("/")[2])
        stem = base.rpartition(".")[0] or base
        yield valid_text(stem)
        plain = stem.partition("._")[0]  # without the size, such as ._SX300_
        if plain != stem:
            yield valid_text(plain)


def _urls(value: Any) -> Iterator[str]:
    """Yield the texts of a value that may be a text, a list, or dictionaries of lists."""
    if isinstance(value, str) and value:
        try:
            urlsplit(value)
        except ValueError:
            return
        yield value
    elif isinstance(value, dict):
        # Large images first; the key variant holds no URL.
        for name in ("hi_res", "large", "thumb"):
            yield from _urls(value.get(name))
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _urls(entry)


def _create_from_rows(
    db: duckdb.DuckDBPyConnection, table: str, rows: Iterator[dict[str, Any]], schema: pa.Schema
) -> None:
    """Create a table from dictionaries, some thousand at a time."""
    db.register("_batch", schema.empty_table())
    db.execute(f"CREATE TABLE {table} AS FROM _batch")
    while batch := list(islice(rows, BATCH)):
        db.register("_batch", pa.Table.from_pylist(batch, schema))
        db.execute(f"INSERT INTO {table} FROM _batch")
    db.unregister("_batch")


IMPORTER = Importer(
    summary="ratings or reviews and meta_* of Amazon as released in 2014, 2018 and 2023",
    files={
        "interactions": (
            "ratings_*.csv*", "reviews_*.json*", "*.csv", "*.csv.gz", "[!m]*.json*", "[!m]*.jsonl*",
        ),
        "items": ("meta_*.json*",),
        "images": IMAGE_PATTERNS,
        "videos": VIDEO_PATTERNS,
    },
    required=("interactions",),
    read=read,
    example={
        "ratings_Beauty.csv": "A1,B01,5.0,1369699200\nA1,B02,3.0,1355443200\nA2,B01,4.0,1404691\n",
        "meta_Beauty.json": "{'asin': 'B01', 'title': 'Nail polish', 'price': 3.5,"
        " 'imUrl': 'http://images.com/I/51a.jpg', 'categories': [['Beauty', 'Nails']]}\n"
        "{'asin': 'B02', 'description': 'A <b>brush</b>', 'brand': 'OPI'}\n",
    },
)  # fmt: skip
