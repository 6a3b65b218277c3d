from pathlib import Path

import pytest

from features.errors import UserError
from features.warehouse import Warehouse
from tests.pipeline.datasets.raws import folder, items_of, prepared, sequences_of


def _prepared(warehouse: Warehouse, tmp_path: Path, **content: str | bytes) -> None:
    files = {name.replace("__", "/").replace("_dot_", "."): text for name, text in content.items()}
    prepared(warehouse, tmp_path / "raw", files, format="sequences")


def test_space_and_tab_and_empty_lines(warehouse: Warehouse, tmp_path: Path) -> None:
    text = "1 30 4  30\r\n2\t4 5\n\n3\n7 \t 5 \n"
    _prepared(warehouse, tmp_path, sequences_dot_txt=text)
    assert sequences_of(warehouse) == {"1": ["30", "4", "30"], "2": ["4", "5"], "7": ["5"]}
    assert [row["item_id"] for row in items_of(warehouse)] == ["4", "5", "30"]


@pytest.mark.slow
def test_a_very_long_line(warehouse: Warehouse, tmp_path: Path) -> None:
    items = [f"item-{n % 1000:06}" for n in range(250_000)]  # more than DuckDB's default allows
    _prepared(warehouse, tmp_path, sequences_dot_txt="1 " + " ".join(items) + "\n2 5\n")
    assert sequences_of(warehouse) == {"1": items, "2": ["5"]}


def test_two_lines_of_one_user(warehouse: Warehouse, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 4: 1 user .*'1'.*join"):
        _prepared(warehouse, tmp_path, sequences_dot_txt="1 a\n2 b\n\n1 c\n")


@pytest.mark.parametrize("text", ["", "1\n2\n", "\n\n"])
def test_no_interaction(warehouse: Warehouse, tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"sequences\.txt .*--file interactions"):
        _prepared(warehouse, tmp_path, sequences_dot_txt=text)


def test_items_from_jsonl(warehouse: Warehouse, tmp_path: Path) -> None:
    items = (
        '{"id": 1, "title": "- \\t Soap &amp; \\nWater", "categories": [["A","B"],["A","C"]]}\n'
        "\n"
        '{"id": 2, "title": "", "categories": ["D"], "brand": null}\n'
        '{"id": 3, "title": "", "categories": [], "image": "x/3.png"}\n'
        '{"id": 4, "more": {"k": [1.5, true]}}\n'
    )
    folder(tmp_path / "raw", {"x/3.png": "x"})
    _prepared(warehouse, tmp_path, sequences_dot_txt="1 1 2 3 4\n", items_dot_jsonl=items)
    rows = items_of(warehouse)
    assert [row["text"] for row in rows] == ["- Soap & Water. A, B, C", "D", None, None]
    assert [row["image"] for row in rows] == [None, None, "x/3.png", None]
    assert [row["attributes"] for row in rows] == [
        '{"title":"- \\t Soap &amp; \\nWater","categories":[["A","B"],["A","C"]]}',
        '{"title":"","categories":["D"],"brand":null}',
        '{"title":"","categories":[]}',
        '{"more":{"k":[1.5,true]}}',
    ]


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ('{"id": "a"}\n{"id":\n', "line 2: .*JSON object"),
        ('{"id": "a"}\n\n[1]\n', "line 3: .*JSON object"),
        ('"a"\n', "line 1: .*JSON object"),
        ('x\n{"id": "a"}\n2\n[]\nnull\n', r"line 1: .*4 lines \(such as 1, 3, 4\)"),
        ('{"id": []}\n{"id": "a"}\n{"id": 1.5}\n', r"line 1: id is \[\] .*2 lines \(1, 3\)"),
        ('{"no": "a"}\n', r"'item_id'.* no;.*rename"),
        ('{"id": "a"}\n{"title": "b"}\n', "1 item without an id.*remove"),
        ('{"id": "a"}\n{"id": "a"}\n', "1 item more than once .*'a'"),
        (b'{"id": "a"}\n{"id": "\xff"}\n', "line 2: .*UTF-8"),
    ],
)
def test_mistakes_in_jsonl(
    warehouse: Warehouse, tmp_path: Path, items: str | bytes, expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        _prepared(warehouse, tmp_path, sequences_dot_txt="1 a\n", items_dot_jsonl=items)


def test_titles_in_tsv_may_hold_quotes(warehouse: Warehouse, tmp_path: Path) -> None:
    _prepared(
        warehouse,
        tmp_path,
        sequences_dot_txt="1 a b\n",
        items_dot_tsv='id\ttitle\na\t7" disc\nb\t"\n',
    )
    assert [row["text"] for row in items_of(warehouse)] == ['7" disc', '"']
