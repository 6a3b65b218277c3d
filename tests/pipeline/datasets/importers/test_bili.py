import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from features.errors import UserError
from features.warehouse import Warehouse
from pipeline.datasets.prepare import PrepareOptions, prepare_dataset
from pipeline.media.lmdb import LmdbImages
from tests.pipeline.datasets.raws import folder, items_of, prepared, sequences_of
from tests.pipeline.media.containers import PIXELS, LMDB_Image, write_lmdb

USERS = "u1\tv2 v1 v2\nu2\tv1\n"


@pytest.mark.parametrize(
    ("name", "items"),
    [
        ("bili_food_items_texts.tsv", 'v1\tA "fine" title\nv2\tTom &amp; Jerry\nv3\tnobody\n'),
        ("QB_item.csv", 'v1,"A ""fine"" title",English\nv2,Tom &amp; Jerry,\nv3,nobody,x\n'),
        ("items.csv", 'item_id,title\nv1,"A ""fine"" title"\nv2,Tom &amp; Jerry\nv3,nobody\n'),
    ],
)
def test_users_and_items(warehouse: Warehouse, tmp_path: Path, name: str, items: str) -> None:
    raw = folder(tmp_path / "raw", {"x_users.tsv": USERS, name: items, "QB_cover/v2.jpg": "x"})
    info = prepare_dataset(warehouse, PrepareOptions(dataset="bili", raw=raw))
    assert (info.users, info.items, info.interactions, info.k_core) == (2, 2, 4, 1)
    assert sequences_of(warehouse, "bili") == {"u1": ["v2", "v1", "v2"], "u2": ["v1"]}
    rows = items_of(warehouse, "bili")
    assert [row["text"] for row in rows] == ['A "fine" title', "Tom & Jerry"]
    assert [row["image"] for row in rows] == [None, "QB_cover/v2.jpg"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"b_users.tsv": USERS}, r"b_users\.tsv, x_users\.tsv.*--file interactions=PATH"),
        ({"x_items.tsv": "v1\n"}, r"x_items\.tsv, line 1: one column.*correct"),
        ({"x_items.tsv": "v1\ta\nv2\n"}, r"x_items\.tsv, line 2: 1 columns.*2"),
        ({"x_items.tsv": b"v1\ta\nv2\t\xff\n"}, r"x_items\.tsv, line 2: .*UTF-8"),
        ({"x_users.tsv": "u1\tv1\nu1\tv2\n"}, r"x_users\.tsv, line 2: 1 user .*'u1'.*join"),
        ({"x_users.tsv": "u1\tv1 v7\n"}, r"1 item of 1 interaction .*'v7'.*--unlisted"),
    ],
)
def test_mistakes(
    warehouse: Warehouse, tmp_path: Path, content: dict[str, str | bytes], expected: str
) -> None:
    good: dict[str, str | bytes] = {"x_users.tsv": USERS, "x_items.tsv": "v1\tA\nv2\tB\n"}
    with pytest.raises(UserError, match=expected):
        prepared(warehouse, tmp_path / "raw", {**good, **content}, dataset="kwai", format=None)


@pytest.mark.parametrize("subdir", [False, True])
def test_covers_in_an_lmdb(warehouse: Warehouse, tmp_path: Path, subdir: bool) -> None:
    raw = folder(tmp_path / "raw", {"x_users.tsv": USERS, "x_items.tsv": "v1\tA\nv2\tB\n"})
    pickled = pickle.dumps(LMDB_Image(PIXELS, "v1"))
    values = {"v1": pickled, "__keys__": pickle.dumps(["v1"]), "__len__": pickle.dumps(1)}
    write_lmdb(raw / "x_images.lmdb", values, subdir=subdir)
    prepare_dataset(warehouse, PrepareOptions(dataset="hm", raw=raw))
    assert [row["image"] for row in items_of(warehouse, "hm")] == ["x_images.lmdb#v1", None]
    with LmdbImages(raw / "x_images.lmdb") as covers:
        assert list(covers.keys()) == ["v1"]
        cover = covers.get("v1")
        assert isinstance(cover, Image.Image)
        np.testing.assert_array_equal(np.asarray(cover), PIXELS)
        with pytest.raises(UserError, match="no key 'v9'"):
            covers.get("v9")
