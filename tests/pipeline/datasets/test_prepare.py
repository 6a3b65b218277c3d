import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pipeline.datasets.prepare
import pipeline.datasets.swap
from features.atomic_files import lock
from features.errors import UserError
from features.schema import INTERACTIONS_SCHEMA, ITEMS_SCHEMA
from features.warehouse import DatasetInfo, Warehouse
from pipeline.datasets.canonical_sql import filter_core
from pipeline.datasets.listing import list_datasets
from pipeline.datasets.prepare import PrepareOptions, prepare
from pipeline.datasets.registry import DATASETS
from tests.pipeline.datasets.raws import (
    INTERACTIONS,
    ITEMS,
    folder,
    items_of,
    prepared,
    sequences_of,
)

Pairs = list[tuple[int, int]]


# -- k-core ---------------------------------------------------------------------------------


def core_by_hand(pairs: Sequence[tuple[int, int]], k: int) -> Pairs:
    kept = list(pairs)
    while True:
        users, items = Counter(u for u, _ in kept), Counter(i for _, i in kept)
        fewer = [(u, i) for u, i in kept if users[u] >= k and items[i] >= k]
        if fewer == kept:
            return kept
        kept = fewer


@pytest.mark.slow
@given(
    pairs=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=80),
    k=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_the_core_is_the_fixpoint(pairs: Pairs, k: int) -> None:
    expected = core_by_hand(pairs, k)
    rows = ", ".join(f"({u}, {i}, {place})" for place, (u, i) in enumerate(pairs))
    with duckdb.connect(config={"threads": 1}) as db:
        db.execute(f"CREATE TABLE core AS SELECT * FROM (VALUES {rows}) t(u, i, place)")
        if not expected:
            with pytest.raises(UserError, match="nothing is left"):
                filter_core(db, k, "x")
            return
        filter_core(db, k, "x")
        assert db.sql("SELECT u, i FROM core ORDER BY place").fetchall() == expected


def test_the_core_unravels_a_chain(warehouse: Warehouse, tmp_path: Path) -> None:
    # A 2-core of a path is empty; with a square at its end only the square stays.
    path = [(n, n) for n in range(9)] + [(n, n + 1) for n in range(9)]
    square = [(u, i) for u in (100, 101) for i in (9, 109)]
    lines = "".join(f"{u},{i}\n" for u, i in path + square)
    catalogue = "".join(f"{i}\n" for i in sorted({i for _, i in path + square}))
    files = {"interactions.csv": "user_id,item_id\n" + lines, "items.csv": "item_id\n" + catalogue}
    info = prepared(warehouse, tmp_path / "raw", files, k_core=2)
    assert (info.users, info.items, info.interactions) == (2, 2, 4)


def test_names_keep_several_cores_of_one_dataset(warehouse: Warehouse, tmp_path: Path) -> None:
    sequences = "1 1 2 3\n2 1 2\n3 1\n"
    raw = folder(tmp_path / "raw", {"Beauty.txt": sequences})
    whole = prepare(warehouse, PrepareOptions(dataset="amazon-beauty", raw=raw, k_core=1))
    two = prepare(
        warehouse, PrepareOptions(dataset="amazon-beauty", name="beauty-2", k_core=2)
    )  # the folder is remembered
    assert (whole.users, two.users, two.name, two.raw) == (3, 2, "beauty-2", str(raw))
    assert warehouse.info("amazon-beauty") == whole
    assert sequences_of(warehouse, "beauty-2") == {"1": ["1", "2"], "2": ["1", "2"]}
    own = prepared(
        warehouse, tmp_path / "own", {"interactions.csv": INTERACTIONS, "items.csv": ITEMS}
    )
    again = prepare(
        warehouse, PrepareOptions(dataset="mine", name="mine-2", k_core=1)
    )  # and the format of one's own
    assert (again.format, again.users) == (own.format, own.users)
    with pytest.raises(UserError, match="--name ml-1m is a dataset of its own"):
        prepare(warehouse, PrepareOptions(dataset="amazon-beauty", name="ml-1m"))
    with pytest.raises(UserError, match="cannot be a folder"):
        prepare(warehouse, PrepareOptions(dataset="amazon-beauty", name="../x"))


def test_repeated_pairs_count_and_stay(warehouse: Warehouse, tmp_path: Path) -> None:
    files = {
        "interactions.csv": "user_id,item_id,timestamp\nu,a,1\nu,a,2\nu,a,2\nv,b,1\n",
        "items.csv": ITEMS,
    }
    notes: list[str] = []
    info = prepared(warehouse, tmp_path / "raw", files, k_core=3, notify=notes.append)
    assert sequences_of(warehouse) == {"u": ["a", "a", "a"]}
    assert info.tied == pytest.approx(1 / 3)
    assert info.summary()["sparsity"] == 0  # of one pair that comes three times
    assert any("1 interaction equal to another" in note for note in notes)


@pytest.mark.parametrize(("k", "items"), [(0, ["a", "b", "c", "d"]), (1, ["a", "b", "c"])])
def test_only_without_a_filter_do_items_stay_that_nobody_has(
    warehouse: Warehouse, tmp_path: Path, k: int, items: list[str]
) -> None:
    files = {"interactions.csv": INTERACTIONS, "items.csv": ITEMS + "d,Dill\n"}
    info = prepared(warehouse, tmp_path / "raw", files, k_core=k)
    assert [row["item_id"] for row in items_of(warehouse)] == items
    assert (info.items, info.k_core) == (len(items), k)


# -- order ----------------------------------------------------------------------------------


@pytest.mark.slow
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(-3, 3)),
        min_size=1,
        max_size=40,
    ),
    timed=st.booleans(),
)
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_users_are_ordered_by_time_then_by_the_file(
    tmp_path: Path, rows: list[tuple[int, int, int]], timed: bool
) -> None:
    shutil.rmtree(tmp_path / "raw", ignore_errors=True)
    header = "user_id,item_id,timestamp\n" if timed else "user_id,item_id\n"
    lines = "".join(f"u{u},i{i},{t}\n" if timed else f"u{u},i{i}\n" for u, i, t in rows)
    listed = "item_id\n" + "".join(f"i{i}\n" for i in range(6))
    files = {"interactions.csv": header + lines, "items.csv": listed}
    warehouse = Warehouse(tmp_path / "warehouse")
    info = prepared(warehouse, tmp_path / "raw", files)
    expected: dict[str, list[str]] = {}
    for u, i, _ in sorted(rows, key=lambda row: row[2]) if timed else rows:  # sorted is stable
        expected.setdefault(f"u{u}", []).append(f"i{i}")
    assert sequences_of(warehouse) == expected
    assert info.timestamps == timed
    times = pq.read_table(warehouse.dataset_dir("mine") / "interactions")["timestamp"].to_pylist()
    assert [time is not None for time in times] == [timed] * len(rows)


@pytest.mark.slow
def test_the_order_of_a_large_file_is_kept(warehouse: Warehouse, tmp_path: Path) -> None:
    """Large enough that DuckDB reads it in parallel pieces."""
    count = 1_500_000
    raw = folder(tmp_path / "raw", {"items.csv": "item_id\n0\n1\n2\n3\n4\n5\n6\n"})
    with duckdb.connect() as db:
        db.execute(
            f"COPY (SELECT 'user-' || (i % 5) AS user_id, (i * i) % 7 AS item_id, 'pad{'x' * 20}'"
            f" AS more FROM range({count}) t(i)) TO '{raw / 'interactions.csv'}' (HEADER)"
        )
    prepare(warehouse, PrepareOptions(dataset="mine", raw=raw, format="table"))
    table = pq.read_table(warehouse.dataset_dir("mine") / "interactions")
    items = table["item"].to_numpy().reshape(5, count // 5)
    for user in range(5):
        place = range(user, count, 5)
        assert items[user].tolist() == [(i * i) % 7 for i in place]


def test_indices_follow_the_ids(warehouse: Warehouse, tmp_path: Path) -> None:
    ids = ["10", "9", "a10", "a9", "007", "7", "12345678901234567890123"]
    rows = "".join(f"{user},{item}\n" for user, item in zip(reversed(ids), ids, strict=True))
    files = {
        "interactions.csv": "user_id,item_id\n" + rows,
        "items.csv": "item_id\n" + "".join(f"{item}\n" for item in ids),
    }
    prepared(warehouse, tmp_path / "raw", files)
    order = ["007", "7", "9", "10", "12345678901234567890123", "a10", "a9"]
    assert [row["item_id"] for row in items_of(warehouse)] == order
    assert list(sequences_of(warehouse)) == order


# -- what is written ------------------------------------------------------------------------


def _bytes(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


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
    before = _bytes(home)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # the number of threads must not show
    assert (
        prepare(warehouse, PrepareOptions(dataset="mine", raw=tmp_path / "raw", format="table"))
        == info
    )
    assert _bytes(home) == before
    leftovers = [path.name for path in home.iterdir() if path.name.endswith(".tmp")]
    assert leftovers == []


SQUARE = "user_id,item_id\nu,a\nu,b\nu,c\nv,a\nv,b\nw,c\n"


def test_the_fingerprint_is_of_the_ordered_ids(warehouse: Warehouse, tmp_path: Path) -> None:
    def fingerprint(items: str, k: int = 0) -> str:
        files = {"interactions.csv": SQUARE, "items.csv": items}
        return prepared(warehouse, tmp_path / "raw", files, k_core=k).fingerprint

    first = fingerprint(ITEMS)
    assert fingerprint(ITEMS.replace("Apple", "Pear")) == first
    assert fingerprint("item_id\nc\nb\na\n") == first
    assert fingerprint("item_id\nc\nb\na\nd\n") != first
    assert fingerprint(ITEMS, k=2) != first


def test_another_core_replaces_the_tables_and_keeps_the_features(
    warehouse: Warehouse, tmp_path: Path
) -> None:
    prepared(warehouse, tmp_path / "raw", {"interactions.csv": SQUARE, "items.csv": ITEMS})
    kept = warehouse.dataset_dir("mine") / "features" / "kept"
    kept.mkdir(parents=True)
    prepare(
        warehouse, PrepareOptions(dataset="mine", raw=tmp_path / "raw", format="table", k_core=2)
    )
    assert sequences_of(warehouse) == {"u": ["a", "b"], "v": ["a", "b"]}
    assert kept.is_dir()


@pytest.mark.parametrize("place", ["check_raw_tables", "filter_core", "write_tables"])
def test_a_failure_leaves_the_earlier_tables(
    warehouse: Warehouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    files = {"interactions.csv": INTERACTIONS, "items.csv": ITEMS}
    prepared(warehouse, tmp_path / "raw", files)
    before = _bytes(warehouse.dataset_dir("mine"))

    def fail(*_: Any) -> None:
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(pipeline.datasets.prepare, place, fail)
    with pytest.raises(RuntimeError):
        prepare(
            warehouse,
            PrepareOptions(dataset="mine", raw=tmp_path / "raw", format="table", k_core=1),
        )
    assert _bytes(warehouse.dataset_dir("mine")) == before


@pytest.mark.parametrize("earlier", [False, True])
def test_an_end_of_memory_or_disk_is_one_line_and_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    files = {"interactions.csv": INTERACTIONS, "items.csv": ITEMS}
    warehouse = Warehouse(tmp_path / "new")
    if earlier:
        prepared(warehouse, tmp_path / "raw", files)
        before = _bytes(warehouse.dataset_dir("mine"))
    clicks = "".join(f"u{i % 9000},i{i % 7000},{i}\n" for i in range(40_000))
    items = "".join(f"i{i},title {i}\n" for i in range(7000))
    large = {
        "interactions.csv": "user_id,item_id,timestamp\n" + clicks,
        "items.csv": "item_id,title\n" + items,
    }
    monkeypatch.setattr(pipeline.datasets.prepare, "MEMORY", "4MB")
    with pytest.raises(UserError, match=r"4MB of memory.*/new/mine .*--warehouse"):
        prepared(warehouse, tmp_path / "raw", large)
    if earlier:
        assert _bytes(warehouse.dataset_dir("mine")) == before
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
        prepare(warehouse, PrepareOptions(dataset="other", raw=tmp_path / "raw", format="table"))
    assert not warehouse.dataset_dir("other").exists()
    assert warehouse.datasets() == ["mine"]


def test_what_a_killed_preparation_left_goes(warehouse: Warehouse, tmp_path: Path) -> None:
    left = warehouse.dataset_dir("mine") / ".prepare.dead.tmp" / "spill"
    left.mkdir(parents=True)
    prepared(warehouse, tmp_path / "raw", {"interactions.csv": INTERACTIONS, "items.csv": ITEMS})
    assert not left.parent.exists()


@pytest.mark.slow
def test_a_kill_among_the_last_steps_leaves_the_old_tables_or_the_new(
    warehouse: Warehouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        """Nothing of ours handles it."""

    home = warehouse.dataset_dir("mine")
    old_raw = {"interactions.csv": INTERACTIONS, "items.csv": ITEMS}
    new_raw = {**old_raw, "interactions.csv": INTERACTIONS + "w,a,9\n"}
    steps = [(os, "replace"), (shutil, "rmtree"), (Path, "unlink"), (Path, "rmdir")]
    swap = pipeline.datasets.swap.swap_tables
    found = []
    for last in range(100):
        shutil.rmtree(home, ignore_errors=True)
        old = prepared(warehouse, tmp_path / "raw", old_raw)
        (home / "media").mkdir()
        (home / "media" / "images.tar").touch()  # which the new tables have no more
        left = iter(range(last))

        def counted(step: Callable[..., Any], left: Iterator[int] = left) -> Callable[..., Any]:
            def do(*given: Any, **more: Any) -> Any:
                if next(left, None) is None:
                    raise KilledError
                return step(*given, **more)

            return do

        def swap_counted(*given: Any) -> None:
            with monkeypatch.context() as patch:
                for owner, name in steps:
                    patch.setattr(owner, name, counted(getattr(owner, name)))
                swap(*given)

        monkeypatch.setattr(pipeline.datasets.prepare, "swap_tables", swap_counted)
        try:
            prepared(warehouse, tmp_path / "raw", new_raw)
            break
        except KilledError:
            monkeypatch.setattr(pipeline.datasets.prepare, "swap_tables", swap)
        with pytest.raises(UserError, match="is no folder"):
            prepare(warehouse, PrepareOptions(dataset="mine", raw=tmp_path / "none"))
        info = warehouse.info("mine")
        assert info.users == 2 + (info != old)
        assert list(sequences_of(warehouse)) == ["u", "v", "w"][: info.users]
        assert (home / "media").exists() == (info == old)
        assert not (home / ".prepared").exists()
        found.append(info == old)
    # Two steps write dataset.json, the third is the one that counts.
    assert found == sorted(found, reverse=True)
    assert 0 < found.count(True) < 4
    assert len(found) > 8


def test_two_preparations_of_one_dataset_do_not_mix(warehouse: Warehouse, tmp_path: Path) -> None:
    files = {"interactions.csv": INTERACTIONS, "items.csv": ITEMS}
    home = warehouse.dataset_dir("mine")
    with (
        lock(home / ".prepare.lock", "the dataset mine"),
        pytest.raises(UserError, match="another process is writing the dataset mine"),
    ):
        prepared(warehouse, tmp_path / "raw", files)
    assert home.is_dir()  # the other one works in it


def test_a_warehouse_and_a_raw_folder_with_odd_names(tmp_path: Path) -> None:
    warehouse = Warehouse(tmp_path / "it's [a] *house?")
    raw = tmp_path / "it's [raw] *?"
    info = prepared(warehouse, raw, {"interactions.csv": INTERACTIONS, "items.csv": ITEMS})
    assert (info.users, info.items, info.interactions) == (2, 3, 4)


# -- mistakes -------------------------------------------------------------------------------


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
    assert "2 items of 3 interactions (such as 'yy', 'zz') not listed" in message
    assert "items.csv" in message
    assert "--unlisted keep" in message
    warehouse = Warehouse(tmp_path / "house")
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
        ({"k_core": -1}, "--k-core -1 is negative"),
        ({"k_core": 5}, "nothing is left of mine after the 5-core (2 users, 3 items, 4 inter"),
        ({"unlisted": "maybe"}, "known: refuse, keep, drop"),
        ({"format": "tabel"}, "unknown format 'tabel'; known: movielens, sequences, bili, table"),
        ({"format": None}, "unknown dataset 'mine'; known: ml-100k, "),
        ({"files": {"itmes": "x"}}, "'itmes'; known: interactions, items, images, videos"),
        ({"files": {"items": "x.csv"}}, "--file items=x.csv: "),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, options: dict[str, Any], expected: str) -> None:
    files: dict[str, str | bytes] = {"interactions.csv": INTERACTIONS, "items.csv": ITEMS}
    assert expected in _refused(tmp_path, files, **options)


def test_a_name_that_cannot_be_a_folder(warehouse: Warehouse, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be a folder"):
        prepare(warehouse, PrepareOptions(dataset="../mine", raw=tmp_path, format="table"))


# -- the list -------------------------------------------------------------------------------


def test_known_and_prepared_datasets_are_listed(warehouse: Warehouse, tmp_path: Path) -> None:
    info = prepared(
        warehouse, tmp_path / "raw", {"interactions.csv": INTERACTIONS, "items.csv": ITEMS}
    )
    folder(warehouse.raw_dir("ml-100k"), {"u.data": "1\t2\t3\t4\n", "u.item": "x"})
    folder(warehouse.raw_dir("ml-1m"), {"users.dat": ""})
    rows = {row["dataset"]: row for row in list_datasets(warehouse)}
    assert json.dumps(rows)  # one JSON document
    assert rows["ml-100k"]["raw_found"]
    assert not rows["ml-1m"]["raw_found"]
    assert rows["ml-1m"]["expected"]["interactions"][0] == "ratings.dat"
    assert rows["ml-1m"]["raw"] == str(warehouse.raw_dir("ml-1m"))
    assert not rows["ml-1m"]["prepared"]
    assert not any(row["damaged"] for row in rows.values())
    mine = rows["mine"]
    assert (mine["users"], mine["items"], mine["interactions"]) == (2, 3, 4)
    assert mine["raw"] == info.raw


def test_the_demo_makes_its_raw_files_once(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def make(raw: Path) -> None:
        made.append(raw)
        folder(raw, {"interactions.csv": INTERACTIONS, "items.csv": ITEMS})

    monkeypatch.setitem(DATASETS, "demo", replace(DATASETS["demo"], generate=make))
    first = prepare(warehouse, PrepareOptions(dataset="demo"))
    assert isinstance(first, DatasetInfo)
    assert prepare(warehouse, PrepareOptions(dataset="demo")) == first
    assert made == [warehouse.raw_dir("demo")]


def test_a_dataset_of_ones_own_is_prepared_again_as_it_was(
    warehouse: Warehouse, tmp_path: Path
) -> None:
    raw = {"items.csv": ITEMS, "interactions.csv": INTERACTIONS}
    first = prepared(warehouse, tmp_path / "raw", raw)
    assert prepare(warehouse, PrepareOptions(dataset="mine", k_core=first.k_core)) == first
    known = prepare(warehouse, PrepareOptions(dataset="hm", raw=tmp_path / "raw", format="table"))
    assert (
        prepare(warehouse, PrepareOptions(dataset="hm")) == known
    )  # not in the layout that its name stands for
    (tmp_path / "raw" / "items.csv").write_text(ITEMS.replace("Apple", "Apricot"))
    again = prepare(warehouse, PrepareOptions(dataset="mine", k_core=first.k_core))
    assert again.fingerprint == first.fingerprint
    assert again.inputs["text"] != first.inputs["text"]
    assert again.inputs["image"] == first.inputs["image"]


def test_a_damaged_description_is_replaced(warehouse: Warehouse, tmp_path: Path) -> None:
    raw = {"items.csv": ITEMS, "interactions.csv": INTERACTIONS}
    first = prepared(warehouse, tmp_path / "raw", raw)
    path = warehouse.dataset_dir("mine") / "dataset.json"
    for damaged in ("{", "[]", "{}", json.dumps({**json.loads(path.read_text()), "items": "3"})):
        path.write_text(damaged)
        with pytest.raises(UserError, match="is damaged"):
            warehouse.info("mine")
        (row,) = [row for row in list_datasets(warehouse) if row["dataset"] == "mine"]
        assert (row["prepared"], row["damaged"]) == (False, True)
        assert prepared(warehouse, tmp_path / "raw", raw) == first
