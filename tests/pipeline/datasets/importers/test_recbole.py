"""RecBole's atomic files in, and out again."""

import json
from pathlib import Path

import pytest

from features.errors import UserError
from features.warehouse import Warehouse
from pipeline.datasets.recbole_export import export_recbole
from tests.pipeline.datasets.raws import INTERACTIONS, items_of, prepared, sequences_of

INTER = (
    "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    "u\tb\t5.0\t9.7e8\nu\ta\t4.0\t100.0\nv\ta\t1\t200\n"
)
ITEM = (
    "item_id:token\tmovie_title:token_seq\tclass:token_seq\tprice:float\tsizes:float_seq\n"
    "a\tToy  Story &amp; more\tComedy Drama\t1.5\t1 2.5\nb\t\t\t\t\n"
)


def test_columns_have_the_types_of_the_header(warehouse: Warehouse, tmp_path: Path) -> None:
    content = {"ml.inter": INTER, "ml.item": ITEM}
    info = prepared(warehouse, tmp_path / "raw", content, format="recbole")
    assert info.timestamps
    assert sequences_of(warehouse) == {"u": ["a", "b"], "v": ["a"]}
    first, second = items_of(warehouse)
    assert first["text"] == "Toy Story & more. Comedy Drama"
    assert second["text"] is None
    attributes = json.loads(first["attributes"])
    assert attributes["class"] == ["Comedy", "Drama"]
    assert attributes["sizes"] == [1.0, 2.5]
    assert attributes["price"] == 1.5


def test_interactions_alone_are_a_dataset(warehouse: Warehouse, tmp_path: Path) -> None:
    info = prepared(warehouse, tmp_path / "a", {"ml.inter": INTER}, format="recbole")
    assert (info.users, info.items, info.interactions) == (2, 2, 3)
    info = prepared(warehouse, tmp_path / "b", {"interactions.csv": INTERACTIONS})
    assert (info.users, info.items, info.interactions) == (2, 3, 4)
    assert not any(row["text"] for row in items_of(warehouse))


@pytest.mark.parametrize("header", ["user_id\titem_id", "user_id\titem_id:int"])
def test_a_header_without_types_is_refused(tmp_path: Path, header: str) -> None:
    with pytest.raises(UserError, match=r"ml\.inter, line 1: 'user_id', 'item_id.*token_seq"):
        prepared(
            Warehouse(tmp_path / "new"), tmp_path / "raw", {"ml.inter": f"{header}\n"},
            format="recbole",
        )  # fmt: skip


@pytest.mark.parametrize("has_times", [True, False])
def test_an_exported_dataset_is_read_again(
    warehouse: Warehouse, tmp_path: Path, has_times: bool
) -> None:
    if has_times:
        content = {"ml.inter": INTER, "ml.item": ITEM}
        prepared(warehouse, tmp_path / "raw", content, format="recbole")
    else:
        item = {
            "id": "a",
            "title": "An\tapple",
            "kinds": [["red fruit", "fruit"]],
            "size": {"x": 1},
        }
        content = {"sequences.txt": "u b a b\nv a\n", "items.jsonl": json.dumps(item) + "\n"}
        prepared(warehouse, tmp_path / "raw", content, format="sequences", unlisted="keep")
    sequences = sequences_of(warehouse)
    texts = [row["text"] for row in items_of(warehouse)]
    paths = export_recbole(warehouse, "mine", tmp_path / "out")
    assert [path.name for path in paths] == ["mine.inter", "mine.item"]
    header = paths[1].read_text().splitlines()[0].split("\t")
    assert ("kinds:token_seq" in header) != has_times
    assert not any(name.startswith("size:") for name in header)
    prepared(warehouse, tmp_path / "out", {}, dataset="again", format="recbole")
    assert sequences_of(warehouse, "again") == sequences
    rows = items_of(warehouse, "again")
    assert [row["text"] for row in rows] == texts
    if not has_times:
        assert json.loads(rows[0]["attributes"])["kinds"] == ["red_fruit", "fruit"]
