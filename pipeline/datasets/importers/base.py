"""The contract of an importer, and the checks that every importer's tables pass.

An importer reads raw files of one layout and leaves two DuckDB tables. The function ``read`` gets
only files that exist. It works in SQL over the raw files and makes no Python object per row.

``raw_interactions(user_id VARCHAR, item_id VARCHAR, timestamp BIGINT, ordinal BIGINT)``
    ``timestamp`` is NULL in every row if the layout has no times. ``ordinal`` is the order of the
    raw file; it orders equal times, and all interactions if there are no times.

``raw_items(item_id VARCHAR, text VARCHAR, image VARCHAR, video VARCHAR, attributes VARCHAR)``
    Every column but the id may be NULL. ``image`` and ``video`` are references
    (:mod:`pipeline.media.references`). ``attributes`` is one JSON object.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import duckdb

from features.errors import UserError
from pipeline.datasets.importers.messages import name_others, name_rows, plural
from pipeline.datasets.importers.raw_sql import fetch_row

Files = Mapping[str, tuple[Path, ...]]
"""Role of a file (``interactions``, ``items``, ``images``, ``videos``, ...) to existing paths."""

FOLDER_ROLES = ("images", "videos")
"""Roles that may have several paths: every match of the first pattern that matches."""

IMAGE_PATTERNS = (
    "images", "covers", "posters*", "images.tar", "covers.tar", "images.lmdb", "covers.lmdb",
)  # fmt: skip
"""Usual names of the folder or container of an item's images."""

VIDEO_PATTERNS = ("videos", "clips")
"""Usual names of the folder of an item's videos."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageColumn:
    """A column of encoded images in a Parquet file."""

    path: Path
    item: str
    """Name of the column of item ids."""
    column: str
    """Name of the column of images: binary, or the struct (bytes, path) of Hugging Face."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportResult:
    """Facts about the two tables that an importer made."""

    timestamps: bool
    """True if interactions have a time."""
    time_unit: str | None = None
    """Unit of the times since 1970, such as ``seconds``; None if it is unknown."""
    notes: tuple[str, ...] = ()
    """Messages for the user, one line each."""
    text_columns: tuple[str, ...] | None = None
    """Columns that form the text of items, in this order; None if the layout has no choice."""
    images: ImageColumn | None = None
    """Images that are bytes in the file of items; ``raw_items.image`` is NULL for them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Importer:
    r"""A raw layout: the files that it consists of, and the function that reads them.

    Examples:
        >>> importer = Importer(
        ...     summary="one line 'user,item' for each interaction",
        ...     files={"interactions": ("log.txt",)},
        ...     required=("interactions",),
        ...     read=lambda db, root, files: ImportResult(timestamps=False),
        ...     example={"log.txt": "ann,shoe\nann,hat\n"},
        ... )
        >>> importer.files["interactions"]
        ('log.txt',)
    """

    summary: str
    """One line for ``mmrec datasets``."""
    files: Mapping[str, tuple[str, ...]]
    """Role to file name patterns relative to the raw folder; the first that matches wins."""
    read: Callable[..., ImportResult]
    """Make ``raw_interactions`` and ``raw_items``: ``read(db, root, files)``.

    ``db`` is the connection that gets the tables, ``root`` the raw folder, and ``files`` the paths
    of each role. The options of ``mmrec prepare`` that the user gives are keyword arguments.

    Raises a UserError if a file is damaged or has another layout.
    """
    example: Mapping[str, str]
    """A tiny dataset of this layout: file name to content. It documents the layout, and the tests
    prepare it."""
    required: tuple[str, ...] = ("interactions", "items")
    """Roles without which a dataset cannot be prepared."""
    options: tuple[str, ...] = ()
    """Keyword arguments of ``read``: ``columns``, a dictionary from ``user``, ``item`` and ``time``
    to names of columns; ``text_columns``, the names of the columns that form the text of items."""


def check_raw_tables(db: duckdb.DuckDBPyConnection, files: Files) -> None:
    """Check the tables of an importer.

    Raises:
        UserError: There is no interaction in the file of interactions, no item, or an id is empty.
    """
    has_users = bool(files.get("interactions"))
    source = files["interactions"][0] if has_users else files["items"][0]
    if has_users and fetch_row(db, "SELECT count(*) FROM raw_interactions")[0] == 0:
        raise UserError(f"{source} holds no interaction; give another by --file interactions=PATH")
    faults = []
    for column in ("user_id", "item_id"):
        count, rows = fetch_row(
            db,
            "SELECT count(*), min(ordinal, 3) FROM raw_interactions"
            f" WHERE coalesce({column}, '') = ''",
        )
        if count:
            faults.append(f"row {rows[0] + 1}: {column} is empty{name_others(count, rows)}")
    if faults:
        raise UserError(f"{source}, {', and '.join(faults)}; fill or remove it")
    listing = files["items"][0] if files.get("items") else source
    if not has_users and fetch_row(db, "SELECT count(*) FROM raw_items")[0] == 0:
        raise UserError(f"{source} holds no item; give another by --file items=PATH")
    unnamed, rows = fetch_row(
        db,
        "SELECT count(*), min(rowid, 3) FROM raw_items WHERE coalesce(item_id, '') = ''",
    )
    if unnamed:
        raise UserError(
            f"{listing}: {plural(unnamed, 'item')} without an id, in {name_rows(unnamed, rows)};"
            " fill the id or remove the row"
        )
