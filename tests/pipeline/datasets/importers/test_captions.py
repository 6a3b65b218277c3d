"""Items without users: captions of images and videos."""

import json
from pathlib import Path

import pytest

from features.dataset import load_dataset
from features.errors import UserError
from features.warehouse import Warehouse
from pipeline.datasets.prepare import PrepareOptions, prepare_dataset
from tests.pipeline.datasets.raws import items_of, prepared

FLICKR = "1_a.jpg#0\tA &amp; B\n1_a.jpg#1\tSecond\n2_b.jpg#0\tOnly\n"


def test_several_captions_of_an_item(warehouse: Warehouse, tmp_path: Path) -> None:
    content = {"flickr8k_captions.txt": FLICKR, "images/1_a.jpg": "x"}
    info = prepared(warehouse, tmp_path / "raw", content, format="captions")
    assert (info.users, info.items, info.interactions) == (0, 2, 0)
    first, second = items_of(warehouse)
    assert (first["item_id"], first["text"], first["image"]) == ("1_a", "A & B", "images/1_a.jpg")
    assert json.loads(first["attributes"]) == {"captions": ["A & B", "Second"]}
    assert (second["text"], second["image"]) == ("Only", None)
    dataset = load_dataset(warehouse, "mine")
    assert dataset.offsets.tolist() == [0]
    assert len(dataset.eval_split("test").users) == 0
    assert dataset.train_counts.tolist() == [0, 0]


def test_each_caption_is_an_item(warehouse: Warehouse, tmp_path: Path) -> None:
    content = {"flickr8k_captions.txt": FLICKR, "images/1_a.jpg": "x"}
    info = prepared(warehouse, tmp_path / "raw", content, format="caption-items")
    assert (info.users, info.items, info.interactions) == (0, 3, 0)
    columns = ("item_id", "text", "image")
    assert [tuple(row[name] for name in columns) for row in items_of(warehouse)] == [
        ("1_a#0", "A & B", "images/1_a.jpg"),
        ("1_a#1", "Second", "images/1_a.jpg"),
        ("2_b#0", "Only", None),
    ]
    assert json.loads(items_of(warehouse)[1]["attributes"]) == {"captioned": "1_a"}


@pytest.mark.parametrize("format", ["captions", "caption-items"])
@pytest.mark.parametrize(
    "content",
    [
        {"captions.csv": "id,caption\na,A dog\n,Nobody\n"},
        {"captions.csv": "id,caption\na,A dog\n,\n"},
        {"captions.txt": "1_a.jpg#0\tA dog\n#1\tNobody\n"},
    ],
)
def test_a_caption_without_an_id_is_refused(
    tmp_path: Path, content: dict[str, str], format: str
) -> None:
    with pytest.raises(UserError, match="without an id"):
        prepared(Warehouse(tmp_path / "new"), tmp_path / "raw", content, format=format)


@pytest.mark.parametrize(
    ("content", "ids", "message"),
    [
        ("id,caption\na,A\nb,\n", ["a#0"], "1 item without a caption left out ('b')"),
        ("id,caption\na,\nb,B\nb,\nc,\n", ["b#0"], "2 items without a caption left out"),
    ],
)
def test_items_without_a_caption_are_named(
    warehouse: Warehouse, tmp_path: Path, content: str, ids: list[str], message: str
) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "captions.csv").write_text(content)
    options = PrepareOptions(dataset="mine", raw=tmp_path / "raw", format="caption-items")
    notes: list[str] = []
    prepare_dataset(warehouse, options, notify=notes.append)
    assert [row["item_id"] for row in items_of(warehouse)] == ids
    assert any(message in note for note in notes)


@pytest.mark.parametrize(
    "content", [{"captions.csv": ""}, {"captions.csv": "id,size\na,1\n"}, {"captions.txt": ""}]
)
def test_files_without_captions_are_refused(tmp_path: Path, content: dict[str, str]) -> None:
    with pytest.raises(UserError, match="captions"):
        prepared(Warehouse(tmp_path / "new"), tmp_path / "raw", content, format="captions")


def test_the_test_captions_of_msr_vtt(warehouse: Warehouse, real_data: Path) -> None:
    raw = real_data / "weird" / "captions"
    info = prepare_dataset(warehouse, PrepareOptions(dataset="msr-vtt", raw=raw))
    assert (info.users, info.items, info.interactions) == (0, 1000, 0)
    assert all(row["text"] for row in items_of(warehouse, "msr-vtt"))


def test_five_captions_of_each_image_of_flickr(tmp_path: Path, real_data: Path) -> None:
    raw = real_data / "weird" / "captions"
    warehouse = Warehouse(tmp_path / "warehouse")
    options = PrepareOptions(
        dataset="flickr",
        raw=raw,
        format="caption-items",
        files={"items": "flickr8k_captions.txt", "images": "images"},
    )
    assert prepare_dataset(warehouse, options).items == 20
    rows = items_of(warehouse, "flickr")
    assert len({row["image"] for row in rows}) == 4
    assert all(row["item_id"].rpartition("#")[0] in row["image"] for row in rows)
