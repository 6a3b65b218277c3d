"""Write a prepared dataset as RecBole's atomic files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from features.atomic_files import atomic_write, database, read_errors
from features.dataset import stream_items, verified_parts
from features.errors import UserError
from features.sql_text import parquet_sql
from features.warehouse import Warehouse


def export_recbole(warehouse: Warehouse, dataset: str, folder: Path) -> tuple[Path, Path]:
    """Write ``NAME.inter`` and ``NAME.item`` into a folder; return their paths.

    Interactions are in the order of the user and of time. Without times, ``timestamp`` is the
    position in the user's history. The text is ``text:token_seq``. Own columns that are numbers are
    of type float, texts of type token, and lists of type token_seq, in which spaces of a token are
    ``_``, because RecBole separates tokens by spaces. Columns of objects are left out.

    Raises:
        UserError: The dataset is not prepared, or an id has a tab or a line end.
    """
    info = warehouse.info(dataset)
    interactions, items = folder / f"{dataset}.inter", folder / f"{dataset}.item"
    time = "timestamp" if info.timestamps else "position"
    tables = warehouse.dataset_dir(dataset)
    remedy = f"run mmrec prepare --dataset {dataset} again"
    for table in ("interactions", "items"):
        verified_parts(warehouse, dataset, table)
    with (
        atomic_write(interactions) as temporary,
        temporary.open("w", encoding="utf-8") as stream,
        read_errors(tables, remedy),
        database() as db,
    ):
        stream.write("user_id:token\titem_id:token\ttimestamp:float\n")
        reader = db.sql(
            f"SELECT user_id, item_id, {time} FROM {parquet_sql(tables / 'interactions')}"
            f" JOIN {parquet_sql(tables / 'items')} USING (item) ORDER BY user, position"
        ).to_arrow_reader(65_536)
        for batch in reader:
            for user, item, value in _rows(batch):
                stream.write(f"{_token(user)}\t{_token(item)}\t{value}\n")
    columns = _column_types(warehouse, dataset)
    with atomic_write(items) as temporary, temporary.open("w", encoding="utf-8") as stream:
        header = ["item_id:token", "text:token_seq"]
        header += [f"{_plain(name)}:{kind}" for name, kind in columns.items()]
        stream.write("\t".join(header) + "\n")
        for batch in stream_items(warehouse, dataset, ["item_id", "text", "attributes"]):
            for item, text, attributes in _rows(batch):
                values = json.loads(attributes or "{}")
                cells = [_cell(values.get(name)) for name in columns]
                stream.write("\t".join([_token(item), _plain(text or ""), *cells]) + "\n")
    return interactions, items


def _rows(batch: pa.RecordBatch) -> Iterator[tuple[Any, ...]]:
    yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def _column_types(warehouse: Warehouse, dataset: str) -> dict[str, str]:
    """Return name to type of RecBole of the own columns that can be written."""
    kinds: dict[str, set[str]] = {}
    for batch in stream_items(warehouse, dataset, ["attributes"]):
        for (attributes,) in _rows(batch):
            for name, value in json.loads(attributes or "{}").items():
                if value is not None and name != "text":
                    kinds.setdefault(name, set()).add(_kind(value))
    return {
        name: next(iter(values)) if len(values) == 1 else "token"
        for name, values in sorted(kinds.items())
        if "object" not in values
    }


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return "object"
    if isinstance(value, list):
        return "object" if any(isinstance(part, dict) for part in value) else "token_seq"
    return "float" if isinstance(value, int | float) and not isinstance(value, bool) else "token"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(dict.fromkeys(_flatten(value)))
    return _plain(str(value))


def _flatten(values: list[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, list):
            yield from _flatten(value)
        elif value is not None:
            yield "_".join(str(value).split())


def _plain(text: str) -> str:
    """Return a text with single spaces in place of tabs and line ends."""
    return " ".join(text.split())


def _token(text: str) -> str:
    if any(mark in text for mark in "\t\n\r"):
        raise UserError(
            f"the id {text!r} has a tab or a line end, which RecBole's files cannot hold; change"
            " it in the raw files and prepare the dataset again"
        )
    return text
