"""Items with several rows and copies of interactions are refused, chosen, kept or dropped."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.errors import UserError
from features.warehouse import Warehouse
from tests.pipeline.datasets.raws import INTERACTIONS, ITEMS, items_of, prepared, sequences_of

TWICE = ITEMS + "a,Apricot\nc,Cake\na,Avocado\n"
# Of u: b twice at 2, d twice at 3 as the last two. Of v: c twice at 5, apart in the file.
COPIES = (
    "user_id,item_id,timestamp\nv,c,5\nu,a,1\nu,b,2\nu,b,2\nu,d,3\nu,d,3\nv,a,1\nv,c,5\nv,c,7\n"
)


def test_items_that_are_listed_twice_are_refused_with_examples(tmp_path: Path) -> None:
    rows = "".join(f"{name},Again\n" for name in "dacbb")
    content = {"interactions.csv": INTERACTIONS, "items.csv": ITEMS + "d,Date\n" + rows}
    with pytest.raises(UserError, match=r"lists 4 items.*--duplicate-items first") as caught:
        prepared(Warehouse(tmp_path / "warehouse"), tmp_path / "raw", content)
    assert "'a', 'b', 'c')" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_last_row_of_each_item_is_chosen(warehouse: Warehouse, tmp_path: Path) -> None:
    rows = [line.split(",") for line in TWICE.splitlines()[1:]]
    lines = "\n".join(json.dumps({"id": item, "title": title}) for item, title in rows)
    notes: list[str] = []
    content = {"interactions.csv": INTERACTIONS, "items.jsonl": lines}
    prepared(warehouse, tmp_path / "raw", content, duplicate_items="last", notify=notes.append)
    assert [item["text"] for item in items_of(warehouse)] == ["Avocado", "Bread", "Cake"]
    assert any(re.search(r"2 items.*'a', 'c'.*last", note) for note in notes)


def test_images_are_of_the_chosen_row(warehouse: Warehouse, tmp_path: Path) -> None:
    images: list[bytes | None] = [b"1", b"2", b"3", None]
    table = pa.table({"item_id": ["a", "b", "a", "b"], "image": images})
    (tmp_path / "raw").mkdir()
    pq.write_table(table, tmp_path / "raw" / "items.parquet")
    content = {"interactions.csv": "user_id,item_id\nu,a\nu,b\n"}
    prepared(warehouse, tmp_path / "raw", content, duplicate_items="last")
    assert [item["image"] is not None for item in items_of(warehouse)] == [True, False]


def test_copies_are_kept_and_the_targets_among_them_counted(
    warehouse: Warehouse, tmp_path: Path
) -> None:
    notes: list[str] = []
    content = {"interactions.csv": COPIES, "items.csv": ITEMS + "d,Date\n"}
    info = prepared(warehouse, tmp_path / "raw", content, notify=notes.append)
    # u: a b b [d] [d], the test target is a copy. v: a c [c] [c at 7], the validation target is.
    assert (info.interactions, info.copied_targets) == (9, 2)
    assert info.duplicate_interactions == "keep"
    (note,) = [note for note in notes if "equal to another" in note]
    assert note.startswith("3 interactions")
    assert "2 held-out targets" in note
    assert "--duplicate-interactions drop" in note


def test_copies_are_dropped_before_the_core(warehouse: Warehouse, tmp_path: Path) -> None:
    notes: list[str] = []
    content = {"interactions.csv": COPIES, "items.csv": ITEMS + "d,Date\n"}
    options: dict[str, Any] = {"duplicate_interactions": "drop", "notify": notes.append}
    info = prepared(warehouse, tmp_path / "raw", content, min_user=3, **options)
    assert sequences_of(warehouse) == {"u": ["a", "b", "d"], "v": ["a", "c", "c"]}
    assert (info.copied_targets, info.tied, info.duplicate_interactions) == (0, 0.0, "drop")
    assert "3 interactions equal to another in user, item and time; dropped" in notes


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"duplicate_interactions": "drop"}, "has no times"),
        ({"duplicate_interactions": "all"}, "keep, drop"),
        ({"duplicate_items": "all"}, "refuse, first, last"),
    ],
)
def test_choices_that_cannot_be(tmp_path: Path, options: dict[str, Any], expected: str) -> None:
    content = {"interactions.csv": "user_id,item_id\nu,a\nu,a\n", "items.csv": ITEMS}
    with pytest.raises(UserError, match=expected):
        prepared(Warehouse(tmp_path / "warehouse"), tmp_path / "raw", content, **options)
