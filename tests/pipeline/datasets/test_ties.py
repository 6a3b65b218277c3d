"""Interactions of equal times: their share, and the orders of --ties."""

import hashlib
import json
import random
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.errors import UserError
from features.warehouse import Warehouse
from pipeline.datasets.canonical_sql import TIES
from tests.pipeline.datasets.raws import folder, prepared, sequences_of

Row = tuple[str, str, int]
"""User, item and time."""


def raw_files(rows: Sequence[Row]) -> dict[str, str]:
    """Return a raw folder of the importer ``table`` with these interactions."""
    lines = "".join(f"{user},{item},{time}\n" for user, item, time in rows)
    listed = "".join(f"{item}\n" for item in sorted({item for _, item, _ in rows}))
    return {
        "interactions.csv": "user_id,item_id,timestamp\n" + lines,
        "items.csv": "item_id\n" + listed,
    }


@pytest.mark.parametrize(
    ("rows", "tied", "ascending"),
    [
        pytest.param([("u", "b", 1), ("u", "a", 2), ("v", "a", 1)], 0.0, None, id="none tied"),
        pytest.param([("u", "a", 1), ("v", "a", 1)], 0.0, None, id="equal times of two users"),
        pytest.param([("u", "a", 1), ("u", "b", 1), ("u", "c", 1)], 2 / 3, 1.0, id="all tied"),
        pytest.param([("u", "c", 1), ("u", "a", 1), ("u", "b", 1)], 2 / 3, 0.5, id="one user"),
        pytest.param([("u", "a", 1), ("u", "a", 1)], 1 / 2, None, id="one item twice"),
        pytest.param([("u", "a", 1), ("u", "a", 1), ("u", "b", 1)], 2 / 3, 1.0, id="item repeated"),
        pytest.param([("u", "9", 1), ("u", "10", 1)], 1 / 2, 1.0, id="integers in text"),
        pytest.param([("u", "x9", 1), ("u", "x10", 1)], 1 / 2, 0.0, id="text"),
        pytest.param([("u", "z", 1), ("u", "5", 1)], 1 / 2, 0.0, id="numbers come first"),
        pytest.param(
            [("v", "b", 7), ("u", "b", 7), ("v", "a", 7), ("u", "c", 7)], 1 / 2, 0.5, id="mixed"
        ),
    ],
)
def test_share_of_ties_and_of_ascending_pairs(
    warehouse: Warehouse, tmp_path: Path, rows: list[Row], tied: float, ascending: float | None
) -> None:
    for ties in TIES:  # the facts are those of the raw file, for any order
        notes: list[str] = []
        info = prepared(
            warehouse, tmp_path / "raw", raw_files(rows), ties=ties, notify=notes.append
        )
        assert info.ties == ties
        assert info.tied == pytest.approx(tied)
        assert info.tied_ascending == (None if ascending is None else pytest.approx(ascending))
        assert warehouse.info("mine") == info
        assert info.summary()["tied_ascending"] == info.tied_ascending
        messages = [note for note in notes if "have the time of" in note]
        assert len(messages) == bool(tied)
        if tied:
            assert f"{tied:.1%}" in messages[0]
            assert f"ordered by {ties}" in messages[0]
            assert ascending is None or f"{ascending:.1%}" in messages[0]


@pytest.mark.parametrize(
    ("ids", "ascending"),
    [
        (["10", "9", "100"], ["9", "10", "100"]),
        (["b", "a", "C"], ["C", "a", "b"]),
        (["a1", "2", "10", "12345678901234567890"], ["2", "10", "12345678901234567890", "a1"]),
    ],
)
def test_orders_by_id(
    warehouse: Warehouse, tmp_path: Path, ids: list[str], ascending: list[str]
) -> None:
    rows = [("u", item, 5) for item in ids] + [("u", ids[0], 4), ("u", ids[-1], 6)]
    for ties, expected in (("file", ids), ("id", ascending), ("id-desc", ascending[::-1])):
        prepared(warehouse, tmp_path / "raw", raw_files(rows), ties=ties)
        assert sequences_of(warehouse) == {"u": [ids[0], *expected, ids[-1]]}


def test_hash_is_independent_of_the_order_of_the_file(warehouse: Warehouse, tmp_path: Path) -> None:
    rows = [(f"u{n % 7}", f"i{n * 11 % 40}", n // 70) for n in range(280)]
    sequences = []
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        info = prepared(warehouse, tmp_path / "raw", raw_files(rows), ties="hash")
        assert info.tied == pytest.approx(0.9)
        sequences.append(sequences_of(warehouse))
    assert sequences[1:] == sequences[:1] * 2


def test_hash_is_the_md5_of_the_ids(warehouse: Warehouse, tmp_path: Path) -> None:
    """A definition without DuckDB gives the same order, so it is the same on every machine."""
    users, items = ("ann", "bob", "\N{GREEK SMALL LETTER ALPHA}"), ["1", "2", "3", "x", "\xe9"]
    rows = [(user, item, 1) for user in users for item in items]
    prepared(warehouse, tmp_path / "raw", raw_files(rows), ties="hash")

    def number(user: str, item: str) -> int:
        text = f"{len(user.encode())}:{user}{item}"
        return int.from_bytes(hashlib.md5(text.encode()).digest()[8:], "little")

    expected = {user: sorted(items, key=partial(number, user)) for user in users}
    assert sequences_of(warehouse) == expected
    assert expected["ann"] != expected["bob"]  # each user has an order of their own


def test_ties_are_exact_at_every_precision(warehouse: Warehouse, tmp_path: Path) -> None:
    """Some rows have a day, others a second or a nanosecond; only equal times tie."""
    day = 1_700_000_000_000_000_000 // 86_400_000_000_000 * 86_400_000_000_000
    times = [day, day, day + 1_000_000_000, day + 1_000_000_000, day + 1, day + 2]
    raw = folder(tmp_path / "raw", {"items.csv": "item_id\na\nb\nc\nd\ne\nf\n"})
    columns = {"user_id": ["u"] * 6, "item_id": list("bafedc")}
    table = pa.table({**columns, "timestamp": pa.array(times, pa.timestamp("ns"))})
    pq.write_table(table, raw / "interactions.parquet")
    info = prepared(warehouse, raw, {}, ties="id")
    assert info.tied == pytest.approx(2 / 6)
    assert info.tied_ascending == 0.0
    assert sequences_of(warehouse) == {"u": ["a", "b", "d", "c", "e", "f"]}


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_ties_of_every_unit_of_time(warehouse: Warehouse, tmp_path: Path, unit: str) -> None:
    raw = folder(tmp_path / "raw", {"items.csv": "item_id\na\nb\nc\n"})
    moments = [datetime(2026, 1, 1, tzinfo=UTC)] * 2 + [datetime(2026, 1, 2, tzinfo=UTC)]
    table = pa.table(
        {
            "user_id": ["u"] * 3,
            "item_id": ["b", "a", "c"],
            "timestamp": pa.array(moments, pa.timestamp(unit, tz="UTC")),
        }
    )
    pq.write_table(table, raw / "interactions.parquet")
    info = prepared(warehouse, raw, {}, ties="id")
    assert info.tied == pytest.approx(1 / 3)
    assert sequences_of(warehouse) == {"u": ["a", "b", "c"]}


def test_the_same_facts_from_several_layouts(warehouse: Warehouse, tmp_path: Path) -> None:
    """CSV, TSV and the files of MovieLens give one order of one set of interactions."""
    rows = [("1", "20", 7), ("1", "3", 7), ("2", "3", 7), ("1", "5", 8)]
    csv = raw_files(rows)
    tsv = {"interactions.tsv": csv["interactions.csv"].replace(",", "\t"), **csv}
    del tsv["interactions.csv"]
    ratings = "".join(f"{user}\t{item}\t5\t{time}\n" for user, item, time in rows)
    listing = "".join(f"{item}|t ({item})|d||u" + "|0" * 19 + "\n" for item in (3, 5, 20))
    movielens = {"u.data": ratings, "u.item": listing}
    facts = []
    known: dict[str, Any] = {"dataset": "ml-100k", "format": None, "k_core": 0, "name": "mine"}
    layouts: list[tuple[str, dict[str, str], dict[str, Any]]] = [
        ("csv", csv, {}),
        ("tsv", tsv, {}),
        ("ml", movielens, known),
    ]
    for name, files, options in layouts:
        info = prepared(warehouse, tmp_path / name, files, ties="id", **options)
        facts.append((info.tied, info.tied_ascending, sequences_of(warehouse)))
    assert facts == [(0.25, 0.0, {"1": ["3", "20", "5"], "2": ["3"]})] * 3


@pytest.mark.parametrize("ties", [name for name in TIES if name != "file"])
def test_an_order_of_times_that_are_not_there_is_refused(
    warehouse: Warehouse, tmp_path: Path, ties: str
) -> None:
    files = {"interactions.csv": "user_id,item_id\nu,b\nu,a\n", "items.csv": "item_id\na\nb\n"}
    with pytest.raises(UserError, match=rf"--ties {ties} .*interactions\.csv.* leave"):
        prepared(warehouse, tmp_path / "raw", files, ties=ties)
    info = prepared(warehouse, tmp_path / "raw", files)
    assert (info.tied, info.tied_ascending) == (0.0, None)


def test_an_unknown_order_is_refused(warehouse: Warehouse, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'random'.*file, id, id-desc, hash"):
        prepared(warehouse, tmp_path / "raw", raw_files([("u", "a", 1)]), ties="random")


def test_preparations_without_the_facts_are_read(warehouse: Warehouse, tmp_path: Path) -> None:
    prepared(warehouse, tmp_path / "raw", raw_files([("u", "a", 1), ("u", "b", 1)]))
    path = warehouse.dataset_dir("mine") / "dataset.json"
    document = json.loads(path.read_text())
    del document["ties"], document["tied_ascending"], document["checksum"]
    path.write_text(json.dumps(document))
    info = warehouse.info("mine")
    assert (info.tied, info.ties, info.tied_ascending) == (0.5, "file", None)


@pytest.mark.parametrize(("key", "value"), [("ties", 3), ("tied_ascending", "x"), ("tied", None)])
def test_facts_of_the_wrong_kind_are_damage(
    warehouse: Warehouse, tmp_path: Path, key: str, value: object
) -> None:
    prepared(warehouse, tmp_path / "raw", raw_files([("u", "a", 1), ("u", "b", 1)]))
    path = warehouse.dataset_dir("mine") / "dataset.json"
    document = json.loads(path.read_text()) | {key: value}
    del document["checksum"]
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match=rf"without a usable {key}"):
        warehouse.info("mine")
