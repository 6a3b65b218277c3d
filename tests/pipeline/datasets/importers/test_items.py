"""The columns that form the text of items are printed, chosen and kept with the dataset."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from features.errors import UserError
from features.warehouse import Warehouse
from pipeline.extraction.job import extract_features
from pipeline.extraction.options import ExtractOptions
from tests.pipeline.datasets.raws import items_of, prepared

PAIRS = "user_id,item_id\nu,a\nu,b\n"
ROWS = [
    {"item_id": "a", "title": "Hat", "brand": "Acme", 'Note "x.y"': "soft"},
    {"item_id": "b", "title": "Shoe", "brand": "Bob", 'Note "x.y"': "hard"},
]
CSV = 'item_id,title,brand,"Note ""x.y"""\na,Hat,Acme,soft\nb,Shoe,Bob,hard\n'
TABS = 'item_id:token\ttitle:token_seq\tbrand:token\tNote "x.y":token_seq\n'
LAYOUTS = {
    "json lines": (
        "table",
        {"interactions.csv": PAIRS, "items.jsonl": "\n".join(map(json.dumps, ROWS))},
    ),
    "recbole": (
        "recbole",
        {
            "x.inter": "user_id:token\titem_id:token\nu\ta\nu\tb\n",
            "x.item": TABS + "a\tHat\tAcme\tsoft\nb\tShoe\tBob\thard\n",
        },
    ),
    "bili": ("bili", {"x_users.tsv": "u\ta b\n", "x_items.csv": CSV}),
}  # fmt: skip


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_columns_of_text(warehouse: Warehouse, tmp_path: Path, layout: str) -> None:
    format, content = LAYOUTS[layout]
    notes: list[str] = []
    info = prepared(
        warehouse,
        tmp_path,
        content,
        format=format,
        text_columns=('NOTE "X.Y"', "title"),
        notify=notes.append,
    )
    assert [row["text"] for row in items_of(warehouse)] == ["soft. Hat", "hard. Shoe"]
    columns = ['Note "x.y"', "title"]
    assert info.text_columns == columns
    (note,) = [note for note in notes if note.startswith("text of items:")]
    assert ", ".join(columns) in note


def test_another_choice_is_another_text(warehouse: Warehouse, tmp_path: Path) -> None:
    info = prepared(warehouse, tmp_path, {"interactions.csv": PAIRS, "items.csv": CSV})
    assert info.text_columns == ["title", "brand"]
    options = ExtractOptions(text="hashed")
    assert extract_features(warehouse, "mine", options).tables[0].encoded == 2
    notes: list[str] = []
    prepared(warehouse, tmp_path, {}, text_columns=("title",), notify=notes.append)
    assert any("--text-columns title,brand" in note for note in notes)
    assert extract_features(warehouse, "mine", options).tables[0].encoded == 2


@pytest.mark.parametrize(
    ("format", "choice", "expected"),
    [
        ("table", ("titel", "brand", "colour"), "'titel' and no column 'colour'.*title, brand"),
        ("movielens", ("title",), "--text-columns .*'movielens'.*--format .*or table"),
    ],
)
def test_choices_that_cannot_be(
    tmp_path: Path, format: str, choice: Sequence[str], expected: str
) -> None:
    content = {
        "interactions.csv": PAIRS,
        "items.csv": CSV,
        "ratings.csv": "userId,movieId,rating,timestamp\n",
        "movies.csv": "movieId,title,genres\n",
    }
    with pytest.raises(UserError, match=expected):
        prepared(
            Warehouse(tmp_path / "none"), tmp_path, content, format=format, text_columns=choice
        )
