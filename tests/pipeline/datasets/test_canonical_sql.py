"""The canonical tables: k-core, order, indices and fingerprints."""

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features.errors import UserError
from features.warehouse import Warehouse
from pipeline.datasets.canonical_sql import filter_core
from pipeline.datasets.prepare import PrepareOptions, prepare_dataset
from tests.pipeline.datasets.raws import (
    INTERACTIONS,
    ITEMS,
    folder,
    items_of,
    prepared,
    sequences_of,
)

Pairs = list[tuple[int, int]]


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
            with pytest.raises(UserError, match=r"x .*--k-core"):
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
    prepare_dataset(warehouse, PrepareOptions(dataset="mine", raw=raw, format="table"))
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
