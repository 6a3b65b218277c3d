"""The replacement of tables: errors, kills and concurrent preparations."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline.datasets.database
import pipeline.datasets.prepare
import pipeline.datasets.swap
from features.atomic_files import lock
from features.dataset import load_dataset
from features.errors import UserError
from features.warehouse import Warehouse
from pipeline.datasets.listing import list_datasets
from pipeline.datasets.prepare import PrepareOptions, prepare_dataset
from tests.pipeline.datasets.raws import (
    INTERACTIONS,
    ITEMS,
    files_of,
    prepared,
    sequences_of,
)


def test_another_core_replaces_the_tables_and_keeps_the_features(
    warehouse: Warehouse, tmp_path: Path
) -> None:
    square = "user_id,item_id\nu,a\nu,b\nu,c\nv,a\nv,b\nw,c\n"
    prepared(warehouse, tmp_path / "raw", {"interactions.csv": square, "items.csv": ITEMS})
    kept = warehouse.dataset_dir("mine") / "features" / "kept"
    kept.mkdir(parents=True)
    prepare_dataset(
        warehouse, PrepareOptions(dataset="mine", raw=tmp_path / "raw", format="table", k_core=2)
    )
    assert sequences_of(warehouse) == {"u": ["a", "b"], "v": ["a", "b"]}
    assert kept.is_dir()


def test_interactions_of_another_preparation_are_refused(
    warehouse: Warehouse, tmp_path: Path
) -> None:
    """Each file holds a checksum of its own bytes; dataset.json tells whose files they are."""
    raw = {"interactions.csv": INTERACTIONS, "items.csv": ITEMS}
    prepared(warehouse, tmp_path / "raw", raw)
    load_dataset(warehouse, "mine")
    (part,) = (warehouse.dataset_dir("mine") / "interactions").glob("*.parquet")
    kept = part.read_bytes()
    other = {"interactions.csv": INTERACTIONS.replace("u,a,1", "u,a,3"), "items.csv": ITEMS}
    prepared(warehouse, tmp_path / "other", other)
    assert part.read_bytes() != kept
    part.write_bytes(kept)
    with pytest.raises(UserError, match="interactions"):
        load_dataset(warehouse, "mine")


@pytest.mark.parametrize(
    ("table", "column"),
    [("items", "title"), ("interactions", "timestamp"), ("items", "item_id"), ("items", "image")],
)
def test_pages_that_cannot_be_read_are_one_line(
    warehouse: Warehouse, tmp_path: Path, table: str, column: str
) -> None:
    """The metadata of the file and its other columns are whole."""
    raw = tmp_path / "raw"
    raw.mkdir()
    for name, text in (("interactions", INTERACTIONS), ("items", ITEMS)):
        columns, *rows = (line.split(",") for line in text.splitlines())
        content = pa.table({key: list(values) for key, *values in zip(columns, *rows, strict=True)})
        if name == "items":
            content = content.append_column("image", pa.array([b"\x89PNG"] * len(rows)))
        pq.write_table(content, raw / f"{name}.parquet", use_dictionary=False)
    path = raw / f"{table}.parquet"
    metadata = pq.read_metadata(path)
    page = metadata.row_group(0).column(metadata.schema.names.index(column)).data_page_offset
    damaged = bytearray(path.read_bytes())
    damaged[page : page + 12] = b"\xff" * 12
    path.write_bytes(damaged)
    with pytest.raises(UserError) as error:
        prepare_dataset(warehouse, PrepareOptions(dataset="mine", raw=raw, format="table"))
    assert str(raw) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (duckdb.InvalidInputException("TProtocolException:\nInvalid data"), UserError),
        (duckdb.BinderException("no such column"), duckdb.BinderException),
    ],
)
def test_an_error_of_duckdb_is_one_line_unless_the_statement_is_wrong(
    warehouse: Warehouse,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: duckdb.Error,
    expected: type[Exception],
) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline.datasets.prepare, "check_raw_tables", fail)
    files = {"interactions.csv": INTERACTIONS, "items.csv": ITEMS}
    with pytest.raises(expected) as caught:
        prepared(warehouse, tmp_path / "raw", files)
    assert "\n" not in str(caught.value)
    assert expected is not UserError or str(tmp_path / "raw") in str(caught.value)


@pytest.mark.parametrize("place", ["check_raw_tables", "filter_core", "write_tables"])
def test_a_failure_leaves_the_earlier_tables(
    warehouse: Warehouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    files = {"interactions.csv": INTERACTIONS, "items.csv": ITEMS}
    prepared(warehouse, tmp_path / "raw", files)
    before = files_of(warehouse.dataset_dir("mine"))

    def fail(*_: Any) -> None:
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(pipeline.datasets.prepare, place, fail)
    with pytest.raises(RuntimeError):
        prepare_dataset(
            warehouse,
            PrepareOptions(dataset="mine", raw=tmp_path / "raw", format="table", k_core=1),
        )
    assert files_of(warehouse.dataset_dir("mine")) == before


@pytest.mark.parametrize("earlier", [False, True])
def test_an_end_of_memory_or_disk_is_one_line_and_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    files = {"interactions.csv": INTERACTIONS, "items.csv": ITEMS}
    warehouse = Warehouse(tmp_path / "new")
    if earlier:
        prepared(warehouse, tmp_path / "raw", files)
        before = files_of(warehouse.dataset_dir("mine"))
    clicks = "".join(f"u{i % 9000},i{i % 7000},{i}\n" for i in range(40_000))
    items = "".join(f"i{i},title {i}\n" for i in range(7000))
    large = {
        "interactions.csv": "user_id,item_id,timestamp\n" + clicks,
        "items.csv": "item_id,title\n" + items,
    }
    monkeypatch.setattr(pipeline.datasets.database, "MEMORY_LIMIT", "4MB")
    with pytest.raises(UserError, match=r"4MB of memory.*/new/mine .*--warehouse"):
        prepared(warehouse, tmp_path / "raw", large)
    if earlier:
        assert files_of(warehouse.dataset_dir("mine")) == before
    else:
        assert not warehouse.root.exists()


def test_the_last_renames_are_synced_in_their_order(
    warehouse: Warehouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = warehouse.dataset_dir("mine")
    seen: list[list[str]] = []

    def sync(folder: Path) -> None:
        assert folder == home
        seen.append(sorted(path.name for path in folder.iterdir() if path.name[0] != "."))

    monkeypatch.setattr(pipeline.datasets.swap, "sync_folder", sync)
    prepared(warehouse, tmp_path / "raw", {"interactions.csv": INTERACTIONS, "items.csv": ITEMS})
    tables = ["interactions", "items"]
    assert seen == [[], tables, ["dataset.json", *tables]]


def test_a_failure_leaves_nothing_where_nothing_was(tmp_path: Path) -> None:
    files = {"interactions.csv": INTERACTIONS + "v,zz,9\n", "items.csv": ITEMS}
    warehouse = Warehouse(tmp_path / "new")
    with pytest.raises(UserError):
        prepared(warehouse, tmp_path / "raw", files)
    assert not warehouse.root.exists()
    prepared(warehouse, tmp_path / "raw", files, unlisted="drop")
    with pytest.raises(UserError):
        prepare_dataset(
            warehouse, PrepareOptions(dataset="other", raw=tmp_path / "raw", format="table")
        )
    assert not warehouse.dataset_dir("other").exists()
    assert warehouse.datasets() == ["mine"]


def test_leftovers_of_a_killed_preparation_are_removed(
    warehouse: Warehouse, tmp_path: Path
) -> None:
    left = warehouse.dataset_dir("mine") / ".prepare.dead.tmp" / "spill"
    left.mkdir(parents=True)
    prepared(warehouse, tmp_path / "raw", {"interactions.csv": INTERACTIONS, "items.csv": ITEMS})
    assert not left.parent.exists()


@pytest.mark.slow
def test_a_kill_among_the_last_steps_leaves_the_old_tables_or_the_new(
    warehouse: Warehouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        """A kill: nothing handles it."""

    home = warehouse.dataset_dir("mine")
    old_raw = {"interactions.csv": INTERACTIONS, "items.csv": ITEMS}
    new_raw = {**old_raw, "interactions.csv": INTERACTIONS + "w,a,9\n"}
    steps = [(os, "replace"), (shutil, "rmtree"), (Path, "unlink"), (Path, "rmdir")]
    swap = pipeline.datasets.swap.swap_tables
    old_stayed = []
    for last in range(100):
        shutil.rmtree(home, ignore_errors=True)
        old = prepared(warehouse, tmp_path / "raw", old_raw)
        (home / "media").mkdir()
        (home / "media" / "images.tar").touch()  # the new tables have no media
        left = iter(range(last))

        def counted(step: Callable[..., Any], left: Iterator[int] = left) -> Callable[..., Any]:
            def do(*args: Any, **kwargs: Any) -> Any:
                if next(left, None) is None:
                    raise KilledError
                return step(*args, **kwargs)

            return do

        def swap_counted(*args: Any) -> None:
            with monkeypatch.context() as patch:
                for owner, name in steps:
                    patch.setattr(owner, name, counted(getattr(owner, name)))
                swap(*args)

        monkeypatch.setattr(pipeline.datasets.prepare, "swap_tables", swap_counted)
        try:
            prepared(warehouse, tmp_path / "raw", new_raw)
            break
        except KilledError:
            monkeypatch.setattr(pipeline.datasets.prepare, "swap_tables", swap)
        with pytest.raises(UserError, match=r"none .*--raw"):
            prepare_dataset(warehouse, PrepareOptions(dataset="mine", raw=tmp_path / "none"))
        info = warehouse.info("mine")
        assert info.users == 2 + (info != old)
        assert list(sequences_of(warehouse)) == ["u", "v", "w"][: info.users]
        assert (home / "media").exists() == (info == old)
        assert not (home / ".prepared").exists()
        old_stayed.append(info == old)
    # Two steps write dataset.json; the third one makes the new tables valid.
    assert old_stayed == sorted(old_stayed, reverse=True)
    assert 0 < old_stayed.count(True) < 4
    assert len(old_stayed) > 8


def test_two_preparations_of_one_dataset_do_not_mix(warehouse: Warehouse, tmp_path: Path) -> None:
    files = {"interactions.csv": INTERACTIONS, "items.csv": ITEMS}
    home = warehouse.dataset_dir("mine")
    with (
        lock(home / ".prepare.lock", "the dataset mine"),
        pytest.raises(UserError, match=r"another process.*mine"),
    ):
        prepared(warehouse, tmp_path / "raw", files)
    assert home.is_dir()  # the other process works in it


def test_a_damaged_description_is_replaced(warehouse: Warehouse, tmp_path: Path) -> None:
    raw = {"items.csv": ITEMS, "interactions.csv": INTERACTIONS}
    first = prepared(warehouse, tmp_path / "raw", raw)
    path = warehouse.dataset_dir("mine") / "dataset.json"
    for damaged in ("{", "[]", "{}", json.dumps({**json.loads(path.read_text()), "items": "3"})):
        path.write_text(damaged)
        with pytest.raises(UserError, match=r"dataset\.json.*mmrec prepare"):
            warehouse.info("mine")
        (row,) = [row for row in list_datasets(warehouse) if row["dataset"] == "mine"]
        assert (row["prepared"], row["damaged"]) == (False, True)
        assert prepared(warehouse, tmp_path / "raw", raw) == first


@pytest.mark.parametrize("place", ["check_raw_tables", "create_tables", "write_tables"])
def test_a_folder_removed_during_the_preparation_is_an_error(
    warehouse: Warehouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    files = {"interactions.csv": INTERACTIONS, "items.csv": ITEMS}
    prepared(warehouse, tmp_path / "raw", files)
    original = getattr(pipeline.datasets.prepare, place)

    def remove(*arguments: Any) -> Any:
        result = original(*arguments)
        shutil.rmtree(warehouse.dataset_dir("mine"))
        return result

    monkeypatch.setattr(pipeline.datasets.prepare, place, remove)
    with pytest.raises(UserError, match="removed"):
        prepare_dataset(
            warehouse, PrepareOptions(dataset="mine", raw=tmp_path / "raw", format="table")
        )
    assert not warehouse.is_prepared("mine")
