"""Own columns of items are typed columns of the SQL view ``items``, with safe and unique names."""

import json
from pathlib import Path
from typing import Any

import pytest

from features.errors import UserError
from features.sql_text import quote_identifier
from features.sql_views import query
from features.warehouse import Warehouse
from tests.pipeline.datasets.raws import prepared

HOSTILE = (
    'max "weight"', "it's", "a.b", "select", "$", "*", "a/b~c", "007", "back\\slash", "ünï code",
    "order by 1; --", "dataset", "ITEM", "", "x" * 300,
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
        {"id2": 2**63, "size": {"w": 1}, "paths": [["a"], ["b", "c"]]},
    ]
    write(warehouse, tmp_path, rows, "shop")
    assert columns_of(warehouse) == {
        "code": "VARCHAR", "d": "DOUBLE", "id2": "VARCHAR", "m": "VARCHAR", "n": "BIGINT",
        "paths": "VARCHAR[][]", "price": "DOUBLE", "size": "VARCHAR", "sold": "BOOLEAN",
        "tags": "VARCHAR[]",
    }  # fmt: skip
    table = query(warehouse, "SELECT price, d, code, tags, id2, size, paths FROM items ORDER BY 1")
    assert table["price"].to_pylist() == [2.5, 3.0, None]
    assert table["d"].to_pylist() == [2000.0, 1.5, None]
    assert table["tags"].to_pylist() == [[], ["a", "b"], None]
    last = table.slice(2).to_pylist()[0]
    assert (last["id2"], last["size"]) == (str(2**63), '{"w":1}')
    assert last["paths"] == [["a"], ["b", "c"]]


def test_the_columns_of_a_csv_file(warehouse: Warehouse, tmp_path: Path) -> None:
    content = {
        "interactions.csv": "user_id,item_id\nu,a\n",
        "items.csv": 'item_id,price,"say ""x.y""",text\na,9.50,1,Hat\nb,,2,Shoe\n',
    }
    prepared(warehouse, tmp_path, content)
    table = query(warehouse, 'SELECT price, "say ""x.y""" AS n, raw_text FROM items ORDER BY item')
    assert table.to_pydict() == {"price": [9.5, None], "n": [1, 2], "raw_text": ["Hat", "Shoe"]}


def test_hostile_names_are_columns(warehouse: Warehouse, tmp_path: Path) -> None:
    write(warehouse, tmp_path, [{name: number for number, name in enumerate(HOSTILE)}], "shop")
    taken = {"dataset": "raw_dataset", "ITEM": "raw_ITEM", "": "raw_"}
    names = [taken.get(name, name) for name in HOSTILE]
    assert set(columns_of(warehouse)) == set(names)
    table = query(warehouse, f"SELECT {', '.join(map(quote_identifier, names))} FROM items")
    assert list(table.to_pylist()[0].values()) == list(range(len(HOSTILE)))


def test_names_that_differ_by_case_alone(warehouse: Warehouse, tmp_path: Path) -> None:
    write(warehouse, tmp_path, [{"Size": 1, "size": 2, "SIZE": 3, "raw_size": 4}], "shop")
    table = query(
        warehouse, "SELECT * EXCLUDE (dataset, item, item_id, text, image, video) FROM items"
    )
    values = {name: value for name, value in table.to_pylist()[0].items() if name != "attributes"}
    assert sorted(values.values()) == [1, 2, 3, 4]
    assert (values["SIZE"], values["raw_size"]) == (3, 4)
    assert len({name.lower() for name in values}) == 4


def test_several_datasets(warehouse: Warehouse, tmp_path: Path) -> None:
    write(warehouse, tmp_path / "a", [{"price": 1, "size": 42, "Brand": "A"}], "a")
    write(warehouse, tmp_path / "b", [{"price": 1.5, "size": "XL", "brand": "B"}], "b")
    assert columns_of(warehouse) == {"Brand": "VARCHAR", "price": "DOUBLE", "raw_size": "VARCHAR"}
    table = query(warehouse, "SELECT dataset, price, raw_size, brand FROM items ORDER BY 1")
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("a", 1.0, "42", "A"), ("b", 1.5, "XL", "B")
    ]  # fmt: skip
    with pytest.raises(UserError, match=r'"size" not found.*"raw_size"'):
        query(warehouse, "SELECT size FROM items")


@pytest.mark.parametrize("count", [0, 501])
def test_keys_that_are_data_are_no_columns(
    warehouse: Warehouse, tmp_path: Path, count: int
) -> None:
    write(warehouse, tmp_path, [{f"k{number}": 1 for number in range(count)}], "shop")
    assert columns_of(warehouse) == {}


def test_datasets_of_earlier_versions_have_the_columns(
    warehouse: Warehouse, tmp_path: Path
) -> None:
    write(warehouse, tmp_path, [{"price": 1}], "shop")
    path = warehouse.dataset_dir("shop") / "dataset.json"
    document = json.loads(path.read_text())
    del document["item_columns"], document["checksum"]
    path.write_text(json.dumps(document))
    assert columns_of(warehouse) == {"price": "BIGINT"}
