"""Raw folders and prepared tables for the tests of preparation."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from features.warehouse import DatasetInfo, Warehouse
from pipeline.datasets.prepare import PrepareOptions, prepare_dataset

ITEMS = "item_id,title\na,Apple\nb,Bread\nc,Cheese\n"
INTERACTIONS = "user_id,item_id,timestamp\nu,a,1\nu,b,2\nv,a,1\nv,c,5\n"


def folder(root: Path, content: Mapping[str, str | bytes]) -> Path:
    """Make a raw folder with these files."""
    for name, text in content.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    root.mkdir(parents=True, exist_ok=True)
    return root


def ignore(message: str) -> None:
    """Ignore a message."""


def prepared(
    warehouse: Warehouse,
    root: Path,
    content: Mapping[str, str | bytes],
    *,
    notify: Callable[[str], None] = ignore,
    **options: Any,
) -> DatasetInfo:
    """Prepare the dataset ``mine`` from a folder with these files; the default is ``table``."""
    raw = folder(root, content)
    options = {"dataset": "mine", "raw": raw, "format": "table", **options}
    return prepare_dataset(warehouse, PrepareOptions(**options), notify=notify)


def items_of(warehouse: Warehouse, name: str = "mine") -> list[dict[str, Any]]:
    """Return the rows of the items table."""
    rows = pq.read_table(warehouse.dataset_dir(name) / "items").to_pylist()
    assert [row["item"] for row in rows] == list(range(len(rows)))
    return list(rows)


def sequences_of(warehouse: Warehouse, name: str = "mine") -> dict[str, list[str]]:
    """Return user id to item ids from the interactions table; check its invariants."""
    ids = [row["item_id"] for row in items_of(warehouse, name)]
    table = pq.read_table(warehouse.dataset_dir(name) / "interactions")
    sequences: dict[str, list[str]] = {}
    users: list[int] = []
    for row in table.to_pylist():
        sequence = sequences.setdefault(row["user_id"], [])
        assert row["position"] == len(sequence)
        sequence.append(ids[row["item"]])
        users.append(row["user"])
    assert users == sorted(users)
    assert set(users) == set(range(len(sequences)))
    return sequences


def files_of(folder: Path) -> dict[str, bytes]:
    """Return path to content of every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
