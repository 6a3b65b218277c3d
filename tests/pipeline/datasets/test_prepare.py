"""Preparation as a whole: options, equal bytes, names and mistakes."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from features.errors import UserError
from features.schema import INTERACTIONS_SCHEMA, ITEMS_SCHEMA
from features.warehouse import DatasetInfo, Warehouse
from pipeline.datasets.prepare import PrepareOptions, prepare_dataset
from pipeline.datasets.registry import DATASETS
from tests.pipeline.datasets.raws import (
    INTERACTIONS,
    ITEMS,
    files_of,
    folder,
    items_of,
    prepared,
    sequences_of,
)


def test_names_keep_several_cores_of_one_dataset(warehouse: Warehouse, tmp_path: Path) -> None:
    sequences = "1 1 2 3\n2 1 2\n3 1\n"
    raw = folder(tmp_path / "raw", {"Beauty.txt": sequences})
    whole = prepare_dataset(warehouse, PrepareOptions(dataset="amazon-beauty", raw=raw, k_core=1))
    two = prepare_dataset(
        warehouse, PrepareOptions(dataset="amazon-beauty", name="beauty-2", k_core=2)
    )  # the folder is remembered
    assert (whole.users, two.users, two.name, two.raw) == (3, 2, "beauty-2", str(raw))
    assert warehouse.info("amazon-beauty") == whole
    assert sequences_of(warehouse, "beauty-2") == {"1": ["1", "2"], "2": ["1", "2"]}
    own = prepared(
        warehouse, tmp_path / "own", {"interactions.csv": INTERACTIONS, "items.csv": ITEMS}
    )
    again = prepare_dataset(
        warehouse, PrepareOptions(dataset="mine", name="mine-2", k_core=1)
    )  # and the format of one's own
    assert (again.format, again.users) == (own.format, own.users)
    with pytest.raises(UserError, match=r"--name ml-1m .*another name"):
        prepare_dataset(warehouse, PrepareOptions(dataset="amazon-beauty", name="ml-1m"))
    with pytest.raises(UserError, match=r"\.\./.*letters"):
        prepare_dataset(warehouse, PrepareOptions(dataset="amazon-beauty", name="../x"))


def test_tables_have_the_schemas_and_equal_bytes(
    warehouse: Warehouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"interactions.csv": INTERACTIONS, "items.csv": ITEMS}
    info = prepared(warehouse, tmp_path / "raw", files)
    home = warehouse.dataset_dir("mine")
    assert pq.read_schema(home / "items/part-00000.parquet").equals(ITEMS_SCHEMA)
    interactions = pq.read_schema(home / "interactions/part-00000.parquet")
    assert interactions.equals(INTERACTIONS_SCHEMA)
    assert warehouse.info("mine") == info
    before = files_of(home)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # the number of threads must not show
    assert (
        prepare_dataset(
            warehouse, PrepareOptions(dataset="mine", raw=tmp_path / "raw", format="table")
        )
        == info
    )
    assert files_of(home) == before
    leftovers = [path.name for path in home.iterdir() if path.name.endswith(".tmp")]
    assert leftovers == []


def test_a_warehouse_and_a_raw_folder_with_odd_names(tmp_path: Path) -> None:
    warehouse = Warehouse(tmp_path / "it's [a] *warehouse?")
    raw = tmp_path / "it's [raw] *?"
    info = prepared(warehouse, raw, {"interactions.csv": INTERACTIONS, "items.csv": ITEMS})
    assert (info.users, info.items, info.interactions) == (2, 3, 4)


def _refused(tmp_path: Path, content: dict[str, str | bytes], **options: Any) -> str:
    warehouse = Warehouse(tmp_path / "none")
    with pytest.raises(UserError) as caught:
        prepared(warehouse, tmp_path / "raw", content, **options)
    assert not warehouse.root.exists()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_item_that_is_not_listed(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "interactions.csv": INTERACTIONS + "v,zz,9\nv,yy,9\nv,yy,9\n",
        "items.csv": ITEMS,
    }
    message = _refused(tmp_path, files)
    assert "2 items of 3 interactions (such as 'yy', 'zz')" in message
    assert "items.csv" in message
    assert "--unlisted keep" in message
    warehouse = Warehouse(tmp_path / "warehouse")
    prepared(warehouse, tmp_path / "raw", files, unlisted="drop")
    assert sequences_of(warehouse) == {"u": ["a", "b"], "v": ["a", "c"]}
    prepared(warehouse, tmp_path / "raw", files, unlisted="keep")
    assert sequences_of(warehouse)["v"] == ["a", "c", "zz", "yy", "yy"]
    assert items_of(warehouse)[-1] == {
        "item": 4, "item_id": "zz", "text": None, "image": None, "video": None, "attributes": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"k_core": -1}, r"--k-core -1 .*0"),
        ({"k_core": 5}, r"mine .*5-core.*2 users, 3 items, 4 inter.*--k-core"),
        ({"unlisted": "maybe"}, "'maybe'.*refuse, keep, drop"),
        ({"format": "tabel"}, "'tabel'.*movielens, sequences, .*table"),
        ({"format": None}, "'mine'.*bili, .*--format"),
        ({"files": {"itmes": "x"}}, "'itmes'.*interactions, items, images, videos"),
        ({"files": {"items": "x.csv"}}, r"--file items=x\.csv: .*absolute"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, options: dict[str, Any], expected: str) -> None:
    files: dict[str, str | bytes] = {"interactions.csv": INTERACTIONS, "items.csv": ITEMS}
    assert re.search(expected, _refused(tmp_path, files, **options))


def test_a_name_that_cannot_be_a_folder(warehouse: Warehouse, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.\./.*letters"):
        prepare_dataset(warehouse, PrepareOptions(dataset="../mine", raw=tmp_path, format="table"))


def test_the_demo_makes_its_raw_files_once(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def make(raw: Path) -> None:
        made.append(raw)
        folder(raw, {"interactions.csv": INTERACTIONS, "items.csv": ITEMS})

    monkeypatch.setitem(DATASETS, "demo", replace(DATASETS["demo"], generate=make))
    first = prepare_dataset(warehouse, PrepareOptions(dataset="demo"))
    assert isinstance(first, DatasetInfo)
    assert prepare_dataset(warehouse, PrepareOptions(dataset="demo")) == first
    assert made == [warehouse.raw_dir("demo")]


def test_a_dataset_of_ones_own_is_prepared_again_as_it_was(
    warehouse: Warehouse, tmp_path: Path
) -> None:
    raw = {"items.csv": ITEMS, "interactions.csv": INTERACTIONS}
    first = prepared(warehouse, tmp_path / "raw", raw)
    assert prepare_dataset(warehouse, PrepareOptions(dataset="mine", k_core=first.k_core)) == first
    known = prepare_dataset(
        warehouse, PrepareOptions(dataset="hm", raw=tmp_path / "raw", format="table")
    )
    assert (
        prepare_dataset(warehouse, PrepareOptions(dataset="hm")) == known
    )  # not in the layout that its name stands for
    (tmp_path / "raw" / "items.csv").write_text(ITEMS.replace("Apple", "Apricot"))
    again = prepare_dataset(warehouse, PrepareOptions(dataset="mine", k_core=first.k_core))
    assert again.fingerprint == first.fingerprint
    assert again.inputs["text"] != first.inputs["text"]
    assert again.inputs["image"] == first.inputs["image"]
