"""The layout in which PMMRec, MMSR and NineRec release Bili, Kwai, HM and Amazon.

Users: a TSV of ``user<TAB>item item ...``, oldest first. Items: a TSV or CSV whose first column is
the id and whose second is the title, with or without a line of names. Covers: a folder of files
named by item id, or an LMDB of pickled images under the item ids.
"""

from pathlib import Path

import duckdb

from features.errors import UserError
from pipeline.datasets.importers.base import Blobs, Files, Raw
from pipeline.datasets.importers.items import IDS, create_described, create_from
from pipeline.datasets.importers.media_files import create_items
from pipeline.datasets.importers.raw_sql import delimited_sql, first_row
from pipeline.datasets.importers.sequences import create_from_sequences
from pipeline.datasets.importers.text_sql import install

_FORMS = {".tsv": ("\t", ""), ".csv": (",", '"')}  # delimiter and quote


def read(db: duckdb.DuckDBPyConnection, root: Path, files: Files) -> Raw:
    """Read users, items and covers.

    Raises:
        UserError: A file is damaged, or a user has two lines.
    """
    install(db)
    create_from_sequences(db, files["interactions"][0])
    blobs = _items(db, files["items"][0])
    notes = create_items(db, root, files)
    return Raw(timestamps=False, notes=notes, blobs=blobs)


def _items(db: duckdb.DuckDBPyConnection, path: Path) -> Blobs | None:
    form = _FORMS.get(path.suffix.lower())
    if form is None:
        raise UserError(f"{path} is none of {', '.join(_FORMS)}; convert it to one of them")
    delimiter, quote = form
    first = first_row(path, delimiter, quote)
    if len(first) < 2:
        raise UserError(
            f"{path}, line 1: one column where an id and a title are expected; correct the file"
        )
    if first[0].strip().lower() in {name.lower() for name in IDS}:
        return create_described(db, path).blobs
    names = ["item_id", "title", *(f"column_{index}" for index in range(3, len(first) + 1))]
    source = delimited_sql(path, names, delimiter=delimiter, quote=quote)
    return create_from(db, path, source, names).blobs
