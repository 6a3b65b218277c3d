"""Files of one's own tables: compression, separators, endings and names of columns."""

import gzip
from pathlib import Path

import pytest

from features.errors import UserError
from features.warehouse import Warehouse
from tests.pipeline.datasets.raws import INTERACTIONS, ITEMS, items_of, prepared, sequences_of

SEQUENCES = {"u": ["a", "b"], "v": ["a", "c"]}
TITLES = ["Apple", "Bread", "Cheese"]


def _check(warehouse: Warehouse) -> None:
    assert sequences_of(warehouse) == SEQUENCES
    assert [item["text"] for item in items_of(warehouse)] == TITLES


@pytest.mark.parametrize("name", ["interactions.csv.gz", "Interactions.CSV.GZ"])
@pytest.mark.parametrize("items", ["items.csv.gz", "ITEMS.CSV", "items.Csv"])
def test_compressed_files_and_endings_of_any_case(
    warehouse: Warehouse, tmp_path: Path, name: str, items: str
) -> None:
    text = ITEMS.encode()
    text = gzip.compress(text) if items.endswith("gz") else text
    prepared(warehouse, tmp_path / "raw", {name: gzip.compress(INTERACTIONS.encode()), items: text})
    _check(warehouse)


def test_compressed_json_lines_and_tabs(warehouse: Warehouse, tmp_path: Path) -> None:
    lines = "".join(f'{{"id": "{title[0].lower()}", "title": "{title}"}}\n' for title in TITLES)
    content: dict[str, str | bytes] = {
        "interactions.tsv.gz": gzip.compress(INTERACTIONS.replace(",", "\t").encode()),
        "items.JSONL.gz": gzip.compress(lines.encode()),
    }
    prepared(warehouse, tmp_path / "raw", content)
    _check(warehouse)


@pytest.mark.parametrize("cut", [5, 30])
def test_a_compressed_file_that_is_cut_is_refused(tmp_path: Path, cut: int) -> None:
    content = gzip.compress(INTERACTIONS.encode())[:cut]
    files: dict[str, str | bytes] = {"interactions.csv.gz": content, "items.csv": ITEMS}
    with pytest.raises(UserError, match=r"interactions\.csv\.gz") as caught:
        prepared(Warehouse(tmp_path / "none"), tmp_path / "raw", files)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mark", [";", "\t", "|"])
@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_other_separators(warehouse: Warehouse, tmp_path: Path, mark: str, ending: str) -> None:
    content = {
        f"interactions.{ending}": INTERACTIONS.replace(",", mark),
        f"items.{ending}": ITEMS.replace(",", mark),
    }
    prepared(warehouse, tmp_path / "raw", content)
    _check(warehouse)


@pytest.mark.parametrize(
    ("header", "row", "title"),
    [
        ('item_id;title;"size, weight"', 'a;"Salt; fine";1,5', "Salt; fine"),
        ("item_id;title;a,b,c,d", "a;Salt, fine;1", "Salt, fine"),
        ("item_id,title,a;b;c;d;e", 'a,"Salt, fine",1', "Salt, fine"),
        ('"item_id",title,a;b;c', '"a","Salt; fine",1', "Salt; fine"),
        ("item_id\ttitle\ta,b,c,d", "a\tSalt, fine\t1", "Salt, fine"),
    ],
)
def test_separators_within_names_and_values(
    warehouse: Warehouse, tmp_path: Path, header: str, row: str, title: str
) -> None:
    content = {"interactions.csv": "user_id,item_id\nu,a\n", "items.csv": f"{header}\n{row}\n"}
    prepared(warehouse, tmp_path / "raw", content)
    assert [item["text"] for item in items_of(warehouse)] == [title]


@pytest.mark.parametrize("items_id", ["sku", "item_id", "id"])
def test_names_of_columns(warehouse: Warehouse, tmp_path: Path, items_id: str) -> None:
    header = "ts,sku,item_id,customer\n"
    rows = "2,b,x,u\n1,a,x,u\n1,a,x,v\n5,c,x,v\n"
    content = {"interactions.csv": header + rows, "items.csv": ITEMS.replace("item_id", items_id)}
    columns = {"user": "customer", "item": "SKU", "time": "ts"}
    info = prepared(warehouse, tmp_path / "raw", content, columns=columns)
    assert info.timestamps
    _check(warehouse)


def test_interactions_alone_with_names_of_columns(warehouse: Warehouse, tmp_path: Path) -> None:
    content = {"interactions.csv": "customer;sku\nu;a\nu;b\n"}
    columns = {"user": "customer", "item": "sku"}
    info = prepared(warehouse, tmp_path / "raw", content, columns=columns)
    assert (info.users, info.items, info.interactions) == (1, 2, 2)


@pytest.mark.parametrize(
    ("columns", "format", "expected"),
    [
        ({"user": "client"}, "table", "'client'.*user_id, item_id, timestamp;"),
        ({"time": "ts"}, "table", "'ts'.*user_id, item_id, timestamp;"),
        ({"person": "user_id"}, "table", "--columns person.*user, item, time"),
        ({"user": "user_id"}, "recbole", "--columns .*'recbole'.*--format table"),
    ],
)
def test_names_that_cannot_be_used(
    tmp_path: Path, columns: dict[str, str], format: str, expected: str
) -> None:
    content = {"interactions.csv": INTERACTIONS, "items.csv": ITEMS, "x.inter": "user_id:token"}
    with pytest.raises(UserError, match=expected):
        prepared(
            Warehouse(tmp_path / "none"), tmp_path / "raw", content, columns=columns, format=format
        )
