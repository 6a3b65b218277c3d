"""Importer of items without users: captions of images or videos, and pairs of products.

``items`` is a table with a column of ids and a column of captions, such as the splits of MSR-VTT
and WebVid, or lines ``FILE#NUMBER<TAB>caption`` as Flickr8k has them. An item may have several
rows. The layout ``captions`` takes its first caption as its text, and all captions as the list
``captions`` of its attributes. The layout ``caption-items`` makes each caption an item, ``ID#0``,
``ID#1`` and so on, with the image and the video of ``ID``. Images and videos are files named by the
item id.
"""

from dataclasses import replace
from pathlib import Path

import duckdb

from pipeline.datasets.importers.base import (
    IMAGE_PATTERNS,
    VIDEO_PATTERNS,
    Files,
    Importer,
    ImportResult,
)
from pipeline.datasets.importers.column_types import column_types, id_sql, text_sql
from pipeline.datasets.importers.media_files import create_raw_items
from pipeline.datasets.importers.messages import plural, quote_all
from pipeline.datasets.importers.raw_sql import (
    create_table,
    delimited_sql,
    fetch_row,
    find_column,
    table_sql,
)
from pipeline.datasets.importers.text_sql import clean_sql

_IDS = ("item_id", "video_id", "videoid", "image_id", "image", "id", "item", "asin")
_CAPTIONS = ("caption", "sentence", "text", "title", "name", "description")


def read(db: duckdb.DuckDBPyConnection, root: Path, files: Files) -> ImportResult:
    """Read the captions; there are no interactions.

    Raises:
        UserError: The file is damaged, or has no column of ids or of captions.
    """
    path = files["items"][0]
    if path.suffix.lower() == ".txt":
        source = delimited_sql(path, ["file", "caption"], delimiter="\t")
        item, caption = r"regexp_replace(file, '(\.\w+)?#\d+$', '')", "caption"
    else:
        source, names = table_sql(db, path)
        types = column_types(db, source)
        name = find_column(path, names, *_IDS)
        item = id_sql(name, types[name])
        name = find_column(path, names, *_CAPTIONS)
        caption = text_sql(path, name, types[name])
    create_table(
        db,
        "_captions",
        f"SELECT row_number() OVER () AS row, {item} AS item_id, {clean_sql(caption)} AS caption"
        f" FROM {source}",
        path,
    )
    db.execute(
        "CREATE TABLE described AS SELECT item_id, first(caption ORDER BY row) FILTER (caption IS"
        " NOT NULL) AS text, NULL::VARCHAR AS image, NULL::VARCHAR AS video,"
        " json_object('captions', list(caption ORDER BY row) FILTER (caption IS NOT NULL))::VARCHAR"
        " AS attributes FROM _captions GROUP BY item_id ORDER BY min(row)"
    )
    captions, items = fetch_row(db, "SELECT count(caption), count(DISTINCT item_id) FROM _captions")
    db.execute(
        "CREATE TABLE raw_interactions (user_id VARCHAR, item_id VARCHAR, timestamp BIGINT,"
        " ordinal BIGINT)"
    )
    note = f"{plural(captions, 'caption')} of {plural(items, 'item')}; the first is the text"
    return ImportResult(timestamps=False, notes=(note, *create_raw_items(db, root, files)))


def read_each(db: duckdb.DuckDBPyConnection, root: Path, files: Files) -> ImportResult:
    """Read the captions as items; there are no interactions.

    A row without an id keeps its place, so that it is refused as in the layout ``captions``.

    Raises:
        UserError: The file is damaged, or has no column of ids or of captions.
    """
    result = read(db, root, files)
    omitted, examples = fetch_row(
        db, "SELECT count(*), list(item_id ORDER BY item_id)[:3] FROM described WHERE text IS NULL"
    )
    db.execute(
        "CREATE OR REPLACE TABLE raw_items AS SELECT nullif(item_id, '') || '#' ||"
        " (row_number() OVER (PARTITION BY item_id ORDER BY row) - 1) AS item_id, caption AS text,"
        " image, video, json_object('captioned', item_id)::VARCHAR AS attributes"
        " FROM _captions LEFT JOIN raw_items USING (item_id)"
        " WHERE caption IS NOT NULL OR coalesce(item_id, '') = '' ORDER BY row"
    )
    count, captioned = fetch_row(db, "SELECT count(*), count(DISTINCT attributes) FROM raw_items")
    notes = [f"{plural(count, 'caption')} of {plural(captioned, 'item')}; each is an item"]
    if omitted:
        notes.append(
            f"{plural(omitted, 'item')} without a caption left out ({quote_all(examples)})"
        )
    return replace(result, notes=(*notes, *result.notes[1:]))


IMPORTER = Importer(
    summary="items without users: ids and captions (MSR-VTT, WebVid, Flickr8k)",
    files={
        "items": ("captions.*", "items.*", "*captions*.txt", "*.csv", "*.tsv", "*.parquet"),
        "images": IMAGE_PATTERNS,
        "videos": VIDEO_PATTERNS,
    },
    required=("items",),
    read=read,
    example={"captions.csv": "video_id,sentence\nv1,A man runs\nv1,A runner\nv2,A dog\n"},
)
EACH_CAPTION = replace(
    IMPORTER,
    summary="the same files; each caption is an item, and captions of an image share the image",
    read=read_each,
)
