"""Amazon reviews in the layouts of the three releases, with the faults of the real files."""

import ast
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from features.attributes import load_attributes
from features.errors import UserError
from features.warehouse import Warehouse
from pipeline.datasets.importers.dict_lines import MAX_LITERAL
from pipeline.datasets.registry import DATASETS
from tests.pipeline.datasets.raws import folder, items_of, prepared, sequences_of

META_2014 = (
    "{'asin': 'B01', 'title': \"Women's polish &amp; gel\", 'price': 3.5, 'brand': 'OPI',"
    " 'imUrl': 'http://ecx.images-amazon.com/I/51a%2B._SX300_.jpg', 'related': {'also_bought':"
    " ['B02']}, 'categories': [['Beauty', 'Nails'], ['Gifts']]}\n"
    "{'asin': 'B02', 'description': 'A <b>fine</b><br/>brush &lt;i&gt;x&lt;/i&gt; 3 < 4',"
    " 'categories': [['Beauty']]}\n"
    "{'asin': '7806397051', 'title': 'Palette', 'imUrl': 'http://x.com/I/41p.jpg'}\n"
    "{'asin': 'B02', 'title': 'listed before'}\n"
    "{'asin': 'B03', 'title': ''}\n"
)


def _ratings() -> str:
    """Ratings of 2014 without a header; a few users and items fall out of a 2-core step by step."""
    rows = [
        f"A{user},{item},{user % 5 + 1}.0,{1_300_000_000 + 86_400 * ((user * 7 + step) % 5)}"
        for user in range(40)
        for step, item in enumerate(["B01", "B02", "7806397051", "B03"][: user % 4 + 1])
    ]
    return "\n".join([*rows, rows[3], rows[3]]) + "\n"


def _values(warehouse: Warehouse, column: str, item: int) -> list[str]:
    """Return the values of an item in a column, in alphabetical order."""
    attributes = load_attributes(warehouse, ["mine"], [column])
    ids = attributes.ids[attributes.offsets[item] : attributes.offsets[item + 1]]
    return [attributes.names[i].removeprefix(f"{column}=") for i in ids]


def _count_core(ratings: str, k: int) -> tuple[int, int, int]:
    """Count users, items and interactions of the k-core without a database."""
    rows = [line.split(",") for line in ratings.splitlines()]
    pairs = [(user, item) for user, item, _, _ in rows]
    while True:
        users, items = Counter(user for user, _ in pairs), Counter(item for _, item in pairs)
        kept = [(user, item) for user, item in pairs if min(users[user], items[item]) >= k]
        if len(kept) == len(pairs):
            return len(users), len(items), len(pairs)
        pairs = kept


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("compressed", [False, True])
def test_the_counts_are_those_of_an_independent_script(
    warehouse: Warehouse, tmp_path: Path, k: int, compressed: bool
) -> None:
    meta = gzip.compress(META_2014.encode()) if compressed else META_2014
    name = "meta_Beauty.json.gz" if compressed else "meta_Beauty.json"
    content: dict[str, str | bytes] = {"ratings_Beauty.csv": _ratings(), name: meta}
    info = prepared(
        warehouse, tmp_path / "raw", content, dataset="amazon-beauty-raw", format=None, k_core=k
    )
    assert (info.users, info.items, info.interactions) == _count_core(_ratings(), k)
    titles = [ast.literal_eval(line).get("title") for line in META_2014.splitlines()]
    assert titles.count(None) == 1


def test_items_of_2014(warehouse: Warehouse, tmp_path: Path) -> None:
    content = {
        "ratings_Beauty.csv": _ratings(),
        "meta_Beauty.json": META_2014,
        "images/51a+._SX300_.jpg": "x",
        "images/7806397051.png": "x",
        "images/41p.jpg": "x",
        "images/other.jpg": "x",
    }
    notes: list[str] = []
    prepared(warehouse, tmp_path / "raw", content, format="amazon", notify=notes.append)
    rows = {row["item_id"]: row for row in items_of(warehouse)}
    assert {name: row["text"] for name, row in rows.items()} == {
        "B01": "Women's polish & gel",
        "B02": "A fine brush x 3 < 4",
        "7806397051": "Palette",
        "B03": None,
    }
    assert rows["B01"]["image"] == "images/51a+._SX300_.jpg"
    assert rows["7806397051"]["image"] == "images/7806397051.png"
    assert rows["B02"]["image"] is None
    assert json.loads(rows["B01"]["attributes"])["price"] == 3.5
    assert _values(warehouse, "categories", 1) == ["Beauty", "Gifts", "Nails"]
    assert any("1 line of items" in note for note in notes)
    assert any("other.jpg" in note and "fit no item" in note for note in notes)


_REVIEW_2018 = {"reviewerID": "A1", "asin": "B01", "unixReviewTime": 5, "reviewText": "a\n'b'"}
_META_2018 = {
    "asin": "B01",
    "title": "var aPageStart = (new Date()).getTime();",
    "category": ["Toys", "Games"],
    "description": ["<p>One</p>", "Two"],
    "brand": "Hasbro",
    "price": "$12.99",
    "imageURLHighRes": ["https://images.com/I/61b.jpg"],
}
_REVIEW_2023 = {"user_id": "A1", "asin": "B99", "parent_asin": "B01", "timestamp": 1588687728923}
_META_2023 = {
    "parent_asin": "B01",
    "title": "Game",
    "store": "Hasbro",
    "categories": ["Toys", "Games"],
    "description": [],
    "price": None,
    "details": {"Weight": "1 pound"},
    "images": [{"thumb": "https://i.com/I/t.jpg", "hi_res": None, "large": "https://i.com/I/61b.jpg"}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("reviews", "meta", "names", "text"),
    [
        (_REVIEW_2018, _META_2018, ("Toys_5.json", "meta_Toys.json"), "One Two"),
        (_REVIEW_2023, _META_2023, ("Toys.jsonl", "meta_Toys.jsonl"), "Game"),
    ],
)
def test_reviews_of_2018_and_2023(
    warehouse: Warehouse,
    tmp_path: Path,
    reviews: dict[str, Any],
    meta: dict[str, Any],
    names: tuple[str, str],
    text: str,
) -> None:
    lines = json.dumps(reviews) + "\n" + json.dumps(reviews | {"verified": True}) + "\n"
    content: dict[str, str | bytes] = {
        f"{names[0]}.gz": gzip.compress(lines.encode()),
        f"{names[1]}.gz": gzip.compress((json.dumps(meta) + "\n").encode()),
        "images/61b.webp": "x",
    }
    info = prepared(warehouse, tmp_path / "raw", content, format="amazon")
    assert (info.users, info.items, info.interactions) == (1, 1, 2)
    (row,) = items_of(warehouse)
    assert row["text"] == text
    assert row["image"] == "images/61b.webp"
    assert _values(warehouse, "categories", 0) == ["Games", "Toys"]
    assert _values(warehouse, "brand", 0) == ["Hasbro"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Toys.csv", "B01,A1,5.0,2\nB01,A2,5.0,1\n"),
        ("Toys.csv", "user_id,parent_asin,rating,timestamp\nA1,B01,5.0,2\nA2,B01,5.0,1\n"),
        ("ratings_Toys.csv", "A1,B01,5.0,2\nA2,B01,5.0,1\n"),
    ],
)
def test_the_columns_of_ratings_are_recognised(
    warehouse: Warehouse, tmp_path: Path, name: str, text: str
) -> None:
    content = {name: text, "meta_Toys.json": "{'asin': 'B01'}\n"}
    prepared(warehouse, tmp_path / "raw", content, format="amazon")
    assert sequences_of(warehouse) == {"A1": ["B01"], "A2": ["B01"]}


def test_ratings_alone_are_a_dataset(warehouse: Warehouse, tmp_path: Path) -> None:
    info = prepared(warehouse, tmp_path / "raw", {"ratings_x.csv": _ratings()}, format="amazon")
    assert (info.users, info.items) == (40, 4)


@pytest.mark.parametrize(
    "line",
    [
        b"__import__('os').system('true')\n",
        b"{'asin': open('/etc/passwd').read()}\n",
        b"['B01']\n",
        b"{'asin': 'B01', 'title': '\n",
        b"{" + b"'a': {" * 5000 + b"\n",
        b"{'title': 'no asin'}\n",
        b"{'asin': 'B01', 'title': '" + b"x" * MAX_LITERAL + b"'}\n",
    ],
)
def test_other_lines_are_refused_with_their_number(tmp_path: Path, line: bytes) -> None:
    content: dict[str, str | bytes] = {"ratings_x.csv": _ratings()}
    content["meta_x.json"] = b"{'asin': 'B00'}\n\n" + line + b"{'asin': 'B09'}\n" + line
    lines = r"\(as in 2 lines \(3, 5\)\)"
    with pytest.raises(UserError, match=rf"meta_x\.json, line 3: .*{lines}.*(correct|remove)"):
        prepared(Warehouse(tmp_path / "new"), tmp_path / "raw", content, format="amazon")


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    meta = gzip.compress(META_2014.encode() * 9)[:-40]
    raw = folder(tmp_path / "raw", {"ratings_x.csv": _ratings(), "meta_x.json.gz": meta})
    with pytest.raises(UserError, match=r"meta_x\.json\.gz.*download"):
        prepared(Warehouse(tmp_path / "new"), raw, {}, format="amazon")


def test_the_datasets_of_the_papers_have_names() -> None:
    assert {"amazon-toys", "amazon-home", "amazon", "bili-food", "hm-shoes"} <= set(DATASETS)
