"""Own columns of items are typed columns of the SQL view ``items``, with safe and unique names."""

import json
from pathlib import Path
from typing import Any

import pytest

from features.atomic_files import database
from features.errors import UserError
from features.item_columns import own_columns
from features.sql_text import quote_identifier
from features.sql_views import query
from features.warehouse import Warehouse
from tests.pipeline.datasets.raws import prepared

HOSTILE = (
    'max "weight"', "it's", "a.b", "select", "$", "*", "a/b~c", "007", "back\\slash", "ünï code",
    "order by 1; --", "line\nend", "nul\0a", "nul\0b", "dataset", "ITEM", "", "x" * 300,
)  # fmt: skip


def write(warehouse: Warehouse, folder: Path, items: list[dict[str, Any]], name: str) -> None:
    """Prepare a dataset whose items are lines of JSON."""
    lines = "\n".join(json.dumps({"item_id": f"i{row}", **item}) for row, item in enumerate(items))
    content = {"interactions.csv": "user_id,item_id\nu,i0\n", "items.jsonl": lines}
    prepared(warehouse, folder, content, dataset=name)


def columns_of(warehouse: Warehouse) -> dict[str, str]:
    """Return the names and types of the own columns of the view."""
    rows = query(warehouse, "DESCRIBE SELECT * FROM items").to_pylist()
    return {row["column_name"]: row["column_type"] for row in rows[7:]}


def test_values_have_the_type_that_holds_them_all(warehouse: Warehouse, tmp_path: Path) -> None:
    rows = [
        {
            "price": 3,
            "n": "12",
            "code": "007",
            "tags": ["a", "b"],
            "sold": True,
            "d": "1.5",
            "m": 1,
        },
        {"price": 2.5, "n": "-1", "code": "1", "tags": [], "sold": None, "d": "2e3", "m": "x"},
        {"ids": [1, 2], "any": ["a", {"b": 1}]},
        {"id2": 2**63, "ids": [], "size": {"w": 1}, "paths": [["a"], ["b", "c"]]},
    ]
    write(warehouse, tmp_path, rows, "shop")
    assert columns_of(warehouse) == {
        "any": "VARCHAR[]", "ids": "BIGINT[]",
        "code": "VARCHAR", "d": "DOUBLE", "id2": "VARCHAR", "m": "VARCHAR", "n": "BIGINT",
        "paths": "VARCHAR[][]", "price": "DOUBLE", "size": "VARCHAR", "sold": "BOOLEAN",
        "tags": "VARCHAR[]",
    }  # fmt: skip
    table = query(warehouse, "SELECT price, d, code, tags, id2, size, paths FROM items ORDER BY 1")
    assert table["price"].to_pylist()[:3] == [2.5, 3.0, None]
    assert table["d"].to_pylist()[:2] == [2000.0, 1.5]
    assert table["tags"].to_pylist()[:2] == [[], ["a", "b"]]
    last = next(row for row in table.to_pylist() if row["id2"])
    assert (last["id2"], last["size"]) == (str(2**63), '{"w":1}')
    assert last["paths"] == [["a"], ["b", "c"]]


def test_hostile_names_of_several_datasets(warehouse: Warehouse, tmp_path: Path) -> None:
    hostile = {name: number for number, name in enumerate(HOSTILE)}
    own = {"price": 1, "size": 42, "Brand": "A", "CASE": 1, "Case": 2, "case": 3, "raw_case": 4}
    write(warehouse, tmp_path / "a", [{**hostile, **own}], "a")
    write(warehouse, tmp_path / "b", [{"price": 1.5, "size": "XL", "brand": "B"}], "b")
    # Earlier versions wrote no types of columns.
    path = warehouse.dataset_dir("b") / "dataset.json"
    document = json.loads(path.read_text())
    del document["item_columns"], document["checksum"]
    path.write_text(json.dumps(document))

    taken = {"dataset": "raw_dataset", "ITEM": "raw_ITEM", "": "raw_"}
    names = [taken.get(name, name).replace("\0", "\ufffd") for name in HOSTILE]
    columns = columns_of(warehouse)
    assert {name: columns[name] for name in names} == dict.fromkeys(names, "BIGINT")
    typed = {"Brand": "VARCHAR", "price": "DOUBLE", "raw_size": "VARCHAR"}
    assert typed.items() <= columns.items()
    assert len({name.lower() for name in columns}) == len(HOSTILE) + 7
    selected = ", ".join(map(quote_identifier, [*names, "price", "raw_size", "brand"]))
    first, second = query(warehouse, f"SELECT {selected} FROM items ORDER BY dataset").to_pylist()
    assert list(first.values()) == [*range(len(HOSTILE)), 1.0, "42", "A"]
    assert list(second.values()) == [*[None] * len(HOSTILE), 1.5, "XL", "B"]
    with pytest.raises(UserError, match=r'"size" not found.*"raw_size"'):
        query(warehouse, "SELECT size FROM items")
    row = query(warehouse, "SELECT * FROM items WHERE dataset = 'a'").to_pylist()[0]
    cases = [row[name] for name in columns if "case" in name.lower()]
    assert (sorted(cases), row["CASE"], row["raw_case"]) == ([1, 2, 3, 4], 1, 4)


def test_keys_that_are_data_are_no_columns() -> None:
    text = json.dumps({f"k{number}": 1 for number in range(501)})
    with database() as db:
        assert own_columns(db, f"SELECT '{text}' AS attributes") == {}
        assert own_columns(db, "SELECT NULL::VARCHAR AS attributes") == {}
