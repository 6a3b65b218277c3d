"""What every importer delivers, and the checks that hold for all of them.

An importer is a function ``read(db, root, files) -> Raw``. It is given files that exist and leaves
two DuckDB tables behind; what is between is SQL over the raw files, never an object per row:

``raw_interactions(user_id VARCHAR, item_id VARCHAR, timestamp BIGINT, ordinal BIGINT)``
    ``timestamp`` is NULL throughout where the layout has none; ``ordinal`` is the order of the raw
    file, which decides between equal times and is the whole order where there are none.

``raw_items(item_id VARCHAR, text VARCHAR, image VARCHAR, video VARCHAR, attributes VARCHAR)``
    Anything but the id may be NULL. ``image`` and ``video`` are references
    (:mod:`pipeline.media.references`); ``attributes`` is one JSON object.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import duckdb

from features.errors import UserError
from pipeline.datasets.importers.raw_sql import one

Files = Mapping[str, tuple[Path, ...]]
"""Role (``interactions``, ``items``, ``images``, ``videos``, ``plots``) to the paths found."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Raw:
    """What an importer says about the two tables it left."""

    timestamps: bool
    """Whether interactions bear a time."""
    notes: tuple[str, ...] = ()
    """One line each, for the person who prepares."""
    blobs: "Blobs | None" = None
    """Pictures that stand in the items' file itself; ``raw_items.image`` does not have them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Blobs:
    """A column of encoded pictures in a Parquet file."""

    path: Path
    item: str
    """The column of item ids."""
    column: str
    """Binary, or the struct (bytes, path) that Hugging Face's ``datasets`` writes."""


Importer = Callable[[duckdb.DuckDBPyConnection, Path, Files], Raw]


def check(db: duckdb.DuckDBPyConnection, files: Files) -> None:
    """Refuse raw tables that contradict themselves.

    Raises:
        UserError: No interaction at all, an empty id, or an item that is listed twice.
    """
    source = files["interactions"][0]
    if one(db, "SELECT count(*) FROM raw_interactions")[0] == 0:
        raise UserError(f"{source} holds no interaction; give another by --file interactions=PATH")
    for column in ("user_id", "item_id"):
        (empty,) = one(
            db, f"SELECT min(ordinal) FROM raw_interactions WHERE coalesce({column}, '') = ''"
        )
        if empty is not None:
            raise UserError(f"{source}, row {empty + 1}: {column} is empty; fill or remove it")
    items = files["items"][0] if files.get("items") else source
    (nameless,) = one(db, "SELECT count(*) FROM raw_items WHERE coalesce(item_id, '') = ''")
    if nameless:
        raise UserError(f"{items}: {many(nameless, 'item')} without an id; fill or remove it")
    repeated, such = one(
        db,
        "SELECT count(*), list(item_id ORDER BY item_id)[:3]"
        " FROM (SELECT item_id FROM raw_items GROUP BY item_id HAVING count(*) > 1)",
    )
    if repeated:
        raise UserError(
            f"{items} lists {many(repeated, 'item')} more than once (such as {some(such)});"
            " keep one row for each"
        )


def many(count: int, noun: str) -> str:
    """``1 item``, ``2 items``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def some(values: list[str]) -> str:
    """A few values for a message."""
    return ", ".join(repr(value) for value in values)
