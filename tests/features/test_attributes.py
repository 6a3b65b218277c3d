"""Attributes of items, read from the columns that the raw data brought."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from features.atomic_files import write_table
from features.attributes import load_attributes
from features.errors import UserError
from features.schema import ITEMS_SCHEMA
from features.warehouse import Warehouse
from tests.trainer import worlds

ITEMS: list[dict[str, Any]] = [
    {"genres": "Action|Comedy", "categories": [["Beauty", "Nails"], ["Beauty"]]},
    {"genres": "Comedy", "brand": "Acme", "year": 1999},
    {},
    {"genres": " Action | ", "categories": [], "brand": None, "used": True},
]


@pytest.fixture
def house(warehouse: Warehouse) -> Warehouse:
    write(warehouse, [json.dumps(item) if item else None for item in ITEMS])
    return warehouse


def write(warehouse: Warehouse, attributes: list[str | None]) -> None:
    worlds.prepare(warehouse, [[0, 1, 2, 3, 0, 1]] * 3, len(attributes))
    rows = [
        {"item": item, "item_id": f"i{item}", "attributes": text}
        for item, text in enumerate(attributes)
    ]
    path = warehouse.dataset_dir("world") / "items" / "part-00000.parquet"
    write_table(path, pa.Table.from_pylist(rows, ITEMS_SCHEMA))


def by_item(house: Warehouse, *columns: str, least: int = 1) -> list[set[str]]:
    read = load_attributes(house, ["world"], columns, least=least)
    return [
        {read.names[index] for index in read.ids[begin:end]}
        for begin, end in zip(read.offsets[:-1], read.offsets[1:], strict=True)
    ]


def test_texts_are_split_and_lists_are_flattened(house: Warehouse) -> None:
    assert by_item(house, "genres") == [
        {"genres=Action", "genres=Comedy"},
        {"genres=Comedy"},
        set(),
        {"genres=Action"},
    ]
    assert by_item(house, "categories")[0] == {"categories=Beauty", "categories=Nails"}
    assert by_item(house, "brand", "year", "used") == [
        set(),
        {"brand=Acme", "year=1999"},
        set(),
        {"used=true"},
    ]


def test_rare_attributes_are_left_out(house: Warehouse) -> None:
    assert by_item(house, "genres", "brand", least=2) == [
        {"genres=Action", "genres=Comedy"},
        {"genres=Comedy"},
        set(),
        {"genres=Action"},
    ]


def test_the_padded_table_holds_one_column(house: Warehouse) -> None:
    read = load_attributes(house, ["world"], ["genres", "brand"])
    assert list(read.names) == ["brand=Acme", "genres=Action", "genres=Comedy"]
    expected = [[1, 2], [2, -1], [-1, -1], [1, -1]]
    np.testing.assert_array_equal(read.padded("genres"), expected)
    np.testing.assert_array_equal(read.padded("brand"), [[-1], [0], [-1], [-1]])


def test_an_unknown_column_and_an_object_are_refused(house: Warehouse) -> None:
    with pytest.raises(UserError, match=r"'colour'.*genres"):
        load_attributes(house, ["world"], ["colour"])
    write(house, ['{"size": {"w": 1}}'] * 4)
    with pytest.raises(UserError, match=r"i0.*size"):
        load_attributes(house, ["world"], ["size"])


def test_the_digest_changes_with_an_attribute(house: Warehouse, tmp_path: Path) -> None:
    before = load_attributes(house, ["world"], ["genres"]).digest()
    assert before == load_attributes(house, ["world"], ["genres"]).digest()
    changed = [{**ITEMS[0], "genres": "Action"}, *ITEMS[1:]]
    write(house, [json.dumps(item) for item in changed])
    assert load_attributes(house, ["world"], ["genres"]).digest() != before
