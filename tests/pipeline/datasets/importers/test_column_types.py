"""Columns of Parquet files: NaN, floats, lists, and types that cannot be used."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.errors import UserError
from features.warehouse import Warehouse
from tests.pipeline.datasets.raws import (
    INTERACTIONS,
    ITEMS,
    folder,
    items_of,
    prepared,
    sequences_of,
)

UNITS = ["s", "ms", "us", "ns"]
NAN, INF = float("nan"), float("inf")


def _items(raw: Path, **columns: Any) -> None:
    """Write the items a, b and c with these columns."""
    folder(raw, {"interactions.csv": INTERACTIONS})
    pq.write_table(pa.table({"item_id": ["a", "b", "c"], **columns}), raw / "items.parquet")


def _interactions(raw: Path, **columns: Any) -> None:
    folder(raw, {"items.csv": ITEMS})
    defaults: dict[str, Any] = {"user_id": ["u", "u", "v"], "item_id": ["a", "b", "a"]}
    pq.write_table(pa.table({**defaults, **columns}), raw / "interactions.parquet")


def _refused(raw: Path) -> str:
    warehouse = Warehouse(raw.parent / "none")
    with pytest.raises(UserError) as caught:
        prepared(warehouse, raw, {})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        (pa.array([NAN] * 3), ["x", "y", "z"]),
        (pa.array([NAN, 2.0, 2.5], pa.float32()), ["x", "y. 2", "z. 2.5"]),
        (pa.nulls(3), ["x", "y", "z"]),
        (pa.array([1984, None, 7]), ["x. 1984", "y", "z. 7"]),
        (pa.array([["Beauty", "Skin"], [], None]), ["x. Beauty, Skin", "y", "z"]),
        (pa.array([[5.0, NAN], [2.5, 5.0], [NAN]]), ["x. 5", "y. 2.5, 5", "z"]),
        (pa.array([[[5.0], [5.0]], [], None]), ["x. 5", "y", "z"]),
        (pa.array([["a", None, "a"], ["b"], [None]]), ["x. a", "y. b", "z"]),
        (pa.array([[["A", "B"], ["A", "C"]], [], None]), ["x. A, B, C", "y", "z"]),
        (pa.array(["red", "hat", "red"]).dictionary_encode(), ["x. red", "y. hat", "z. red"]),
        (pa.array(["d", None, "e"], pa.large_string()), ["x. d", "y", "z. e"]),
        (pa.array([0, 1, None], pa.date32()), ["x. 1970-01-01", "y. 1970-01-02", "z"]),
    ],
)
def test_columns_of_text(
    warehouse: Warehouse, tmp_path: Path, values: pa.Array, texts: list[str]
) -> None:
    _items(tmp_path / "raw", title=["x", "y", "z"], description=values)
    prepared(warehouse, tmp_path / "raw", {})
    assert [row["text"] for row in items_of(warehouse)] == texts


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (pa.array([b"a", b"b", b"c"]), "BLOB"),
        (pa.array([True, False, None]), "BOOLEAN"),
        (pa.array([{"en": "x"}] * 3), "STRUCT"),
        (pa.array([[{"en": "x"}]] * 3), "STRUCT"),
        (pa.array([[("en", "x")]] * 3, pa.map_(pa.string(), pa.string())), "MAP"),
        (pa.array([1, 2, 3], pa.duration("s")), "INTERVAL"),
        *((pa.array([[1], None, []], pa.list_(pa.duration(u))), "INTERVAL") for u in UNITS),
        (pa.array([[1, 2]] * 3, pa.list_(pa.duration("ns"), 2)), "INTERVAL"),
        (pa.array([[[1]]] * 3, pa.large_list(pa.list_(pa.duration("ms")))), "INTERVAL"),
        (pa.array([{"t": 1}] * 3, pa.struct([("t", pa.duration("s"))])), "INTERVAL"),
        (pa.array([[("k", 1)]] * 3, pa.map_(pa.string(), pa.duration("us"))), "INTERVAL"),
    ],
)
def test_columns_that_are_no_text_are_refused_by_name(
    tmp_path: Path, values: pa.Array, kind: str
) -> None:
    _items(tmp_path / "raw", title=values)
    message = _refused(tmp_path / "raw")
    assert "items.parquet: the column 'title' is of type" in message
    assert kind in message


def test_attributes_are_json_without_nan(warehouse: Warehouse, tmp_path: Path) -> None:
    _items(
        tmp_path / "raw",
        price=[NAN, INF, 1.5],
        sizes=[[1.0, NAN], None, [INF, 2.0]],
        box=[{"w": NAN, "n": "a"}, None, {"w": 2.0, "n": "c"}],
        length=pa.array([90, None, 5], pa.duration("s")),
    )
    prepared(warehouse, tmp_path / "raw", {})
    attributes = [
        json.loads(row["attributes"], parse_constant=pytest.fail) for row in items_of(warehouse)
    ]
    assert attributes == [
        {"sizes": [1.0, None], "box": {"n": "a"}, "length": "00:01:30"},
        {},
        {"price": 1.5, "sizes": [None, 2.0], "box": {"w": 2.0, "n": "c"}, "length": "00:00:05"},
    ]


def test_columns_of_references_without_a_value(warehouse: Warehouse, tmp_path: Path) -> None:
    _items(tmp_path / "raw", image=[NAN] * 3, video=pa.nulls(3))
    prepared(warehouse, tmp_path / "raw", {})
    assert [(row["image"], row["video"]) for row in items_of(warehouse)] == [(None, None)] * 3
    _items(tmp_path / "raw", image=[NAN, 5.0, NAN])
    assert "'image' is of type DOUBLE" in _refused(tmp_path / "raw")


@pytest.mark.parametrize("kind", [pa.float64(), pa.float32(), pa.decimal128(22, 2), pa.int8()])
@pytest.mark.parametrize("column", ["user_id", "item_id"])
def test_whole_numbers_are_ids(
    warehouse: Warehouse, tmp_path: Path, kind: pa.DataType, column: str
) -> None:
    raw = tmp_path / "raw"
    _interactions(raw, **{column: pa.array([5, 5, 7]).cast(kind)})
    (raw / "items.csv").write_text(ITEMS + "5,Five\n7,Seven\n")
    prepared(warehouse, raw, {})
    users = {"5": ["a", "b"], "7": ["a"]}
    assert sequences_of(warehouse) == (
        users if column == "user_id" else {"u": ["5"] * 2, "v": ["7"]}
    )


def test_float_ids_of_items_with_images_as_bytes(warehouse: Warehouse, tmp_path: Path) -> None:
    raw = folder(tmp_path / "raw", {"interactions.csv": "user_id,item_id\nu,1\nu,2\n"})
    table = {"item_id": [1.0, 2.0], "image": [b"one", b"two"]}
    pq.write_table(pa.table(table), raw / "items.parquet")
    prepared(warehouse, raw, {})
    assert all(row["image"].startswith("prepared:") for row in items_of(warehouse))


@pytest.mark.parametrize("column", ["user_id", "item_id"])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([1.0, NAN, 2.0]), "row 2: {} is empty"),
        (pa.array([1.0, 2.0, 2.5]), "row 3: {} is 2.5, not a whole number"),
        (
            pa.array([1.0, INF, 2.5]),
            "row 2: {} is inf, not a whole number that DOUBLE holds exactly (as in 2 rows (2, 3))",
        ),
        (pa.array([2.0**60, 1.0, 2.0]), "row 1: {} is 1.152921504606847e+18"),
        (pa.array([2.0**25, 1.0, 2.0], pa.float32()), "row 1: {} is 33554432.0"),
        (pa.array([1, 2, 3], pa.decimal256(50, 0)), "'{}' is of type decimal256(50, 0)"),
        (pa.array([True, False, True]), "'{}' is of type BOOLEAN"),
        (pa.array([["u"], ["v"], ["v"]]), "'{}' is of type VARCHAR[]"),
        (pa.array([{"id": 1}] * 3), "'{}' is of type STRUCT"),
        (pa.array([1, 2, 3], pa.duration("us")), "'{}' is of type INTERVAL"),
        (pa.array([1, 2, 3], pa.date32()), "'{}' is of type DATE"),
        (pa.array([1, 2, 3], pa.timestamp("ns", "UTC")), "'{}' is of type TIMESTAMPTZ_NS"),
        (pa.array([b"a", b"b", b"c"]), "'{}' is of type BLOB"),
        (pa.nulls(3), "row 1: {} is empty"),
    ],
)
def test_columns_that_are_no_ids(
    tmp_path: Path, column: str, values: pa.Array, expected: str
) -> None:
    _interactions(tmp_path / "raw", **{column: values})
    assert expected.format(column) in _refused(tmp_path / "raw")


def test_all_columns_of_a_wrong_type_are_named(tmp_path: Path) -> None:
    columns = {"user_id": pa.array([True] * 3), "item_id": pa.array([b"a"] * 3)}
    _interactions(tmp_path / "raw", **columns)
    message = _refused(tmp_path / "raw")
    assert "'user_id' is of type BOOLEAN and 'item_id' is of type BLOB" in message


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    raw = folder(tmp_path / "raw", {"items.csv": ITEMS})
    table = pa.Table.from_arrays([pa.array(["a"])] * 3, ["user_id", "item_id", "Item_ID"])
    pq.write_table(table, raw / "interactions.parquet")
    assert "several columns 'item_id'" in _refused(raw)


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Tokyo"])
def test_times_of_every_unit_and_zone(
    warehouse: Warehouse, tmp_path: Path, unit: str, zone: str | None
) -> None:
    times = pa.array([30, 20, 10], pa.timestamp(unit, zone))
    _interactions(tmp_path / "raw", user_id=["u"] * 3, timestamp=times)
    prepared(warehouse, tmp_path / "raw", {})
    assert sequences_of(warehouse) == {"u": ["a", "b", "a"]}
    table = pq.read_table(warehouse.dataset_dir("mine") / "interactions")
    scale = {"s": 10**6, "ms": 1000}.get(unit, 1)
    assert table["timestamp"].to_pylist() == [10 * scale, 20 * scale, 30 * scale]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([1.0, NAN, 2.0]), "row 2: the timestamp is empty"),
        (pa.array([1, 1 << 63, 2], pa.uint64()), "row 2: .*outside the range"),
        (pa.array([1.0, 1e30, 2.0]), "row 2: .*outside the range"),
        (pa.array([1.0, 1.5, 2.0]), "row 2: .*1.5.*not a whole number"),
        (pa.array([1.7e9, 1.7e9, 2.0], pa.float32()), "row 1: .*FLOAT holds exactly"),
        (pa.array([1.0, 1.0, 4096.0], pa.float16()), "row 3: .*holds exactly"),
        (pa.array([1.0, 1.7e18, 2.0]), "row 2: .*DOUBLE holds exactly"),
        (pa.array([1, 2, 3], pa.decimal256(50, 0)), "decimal256"),
        (
            pa.array([Decimal("1"), Decimal("9007199254740993.5"), Decimal("2")]),
            "row 2: .*not a whole number",
        ),
        (pa.array(["1", "9007199254740993.5", "2"]), "row 2: .*not a whole number"),
        (pa.array([True, False, True]), "'timestamp' is of type BOOLEAN"),
        (pa.array([1, 2, 3], pa.duration("ns")), "'timestamp' is of type INTERVAL"),
        (pa.array([1, 2, 3], pa.time32("s")), "'timestamp' is of type TIME"),
        (pa.array([[1], [2], [3]]), "'timestamp' is of type BIGINT"),
    ],
)
def test_columns_that_are_no_times(tmp_path: Path, values: pa.Array, expected: str) -> None:
    _interactions(tmp_path / "raw", timestamp=values)
    with pytest.raises(UserError, match=expected):
        prepared(Warehouse(tmp_path / "none"), tmp_path / "raw", {})


@pytest.mark.parametrize(
    "kind", [pa.decimal128(38, 0), pa.decimal128(30, 4), pa.int64(), pa.uint64(), pa.string()]
)
@pytest.mark.parametrize("first", [(1 << 53) + 1, 1_700_000_000_000_000_001, (1 << 63) - 3])
def test_large_numbers_keep_every_digit(
    warehouse: Warehouse, tmp_path: Path, kind: pa.DataType, first: int
) -> None:
    numbers = [first + 1, first, first + 2]
    values = pa.array([str(n) for n in numbers]).cast(kind)
    _interactions(tmp_path / "raw", user_id=["u"] * 3, timestamp=values)
    prepared(warehouse, tmp_path / "raw", {})
    table = pq.read_table(warehouse.dataset_dir("mine") / "interactions")
    assert table["timestamp"].to_pylist() == sorted(numbers)
    _interactions(tmp_path / "ids", user_id=values)
    prepared(warehouse, tmp_path / "ids", {})
    assert sorted(sequences_of(warehouse)) == sorted(str(n) for n in numbers)


def test_nan_and_floats_in_jsonl(warehouse: Warehouse, tmp_path: Path) -> None:
    lines = (
        '{"id": 5.0, "title": NaN, "price": NaN, "note": "NaN"}\n'
        '{"id": 7, "title": "Seven", "size": [-Infinity, 1]}\n'
    )
    content = {"interactions.csv": "user_id,item_id\nu,5\nu,7\n", "items.jsonl": lines}
    prepared(warehouse, tmp_path / "raw", content)
    rows = items_of(warehouse)
    assert [(row["item_id"], row["text"]) for row in rows] == [("5", None), ("7", "Seven")]
    assert json.loads(rows[0]["attributes"]) == {"title": None, "price": None, "note": "NaN"}
    assert json.loads(rows[1]["attributes"]) == {"title": "Seven", "size": [None, 1]}


@pytest.mark.parametrize("value", ["5.5", "true", "[1]", '{"a": 1}', "1e300"])
def test_ids_of_jsonl_that_are_no_ids(tmp_path: Path, value: str) -> None:
    lines = f'{{"id": "a"}}\n{{"id": {value}}}\n'
    folder(tmp_path / "raw", {"interactions.csv": INTERACTIONS, "items.jsonl": lines})
    assert "items.jsonl, line 2: id is " in _refused(tmp_path / "raw")


@pytest.mark.parametrize("kind", [pa.float64(), pa.float32(), pa.float16()])
@pytest.mark.parametrize("number", [7.0, 0.0, INF])
def test_nan_beside_one_number_is_null(
    warehouse: Warehouse, tmp_path: Path, kind: pa.DataType, number: float
) -> None:
    # The statistics of the file leave NaN out: the smallest and the largest number are equal.
    values = pa.array([np.float16(value) for value in (number, NAN, number)], pa.float16())
    _items(tmp_path / "raw", title=["x", "y", "z"], description=values.cast(kind), price=values)
    prepared(warehouse, tmp_path / "raw", {})
    text = "inf" if number == INF else str(int(number))
    rows = items_of(warehouse)
    assert [row["text"] for row in rows] == [f"x. {text}", "y", f"z. {text}"]
    for row in rows:
        json.loads(row["attributes"], parse_constant=pytest.fail)
    assert "price" not in rows[1]["attributes"]


@pytest.mark.parametrize("column", ["user_id", "item_id", "timestamp"])
def test_nan_beside_one_number_is_empty(tmp_path: Path, column: str) -> None:
    _interactions(tmp_path / "raw", **{column: [5.0, NAN, 5.0]})
    assert "row 2" in (message := _refused(tmp_path / "raw"))
    assert "empty" in message


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[("w", NAN), ("h", 2.0)], None, [("w", INF)]], [{"h": 2.0}, None, {}]),
        ([[("w", 1.0)], [], [("w", NAN)]], [{"w": 1.0}, {}, {}]),
    ],
)
def test_nan_in_maps_is_null(
    warehouse: Warehouse, tmp_path: Path, values: list[Any], expected: list[Any]
) -> None:
    sizes = pa.array(values, pa.map_(pa.string(), pa.float64()))
    _items(tmp_path / "raw", title=["x", "y", "z"], sizes=sizes)
    prepared(warehouse, tmp_path / "raw", {})
    attributes = [
        json.loads(row["attributes"], parse_constant=pytest.fail) for row in items_of(warehouse)
    ]
    assert [row.get("sizes") for row in attributes] == expected


def test_ids_in_half_precision_are_exact_or_refused(warehouse: Warehouse, tmp_path: Path) -> None:
    for size, is_exact in ((2048, True), (2050, False)):
        raw = tmp_path / str(size)
        _interactions(raw, user_id=pa.array([np.float16(size)] * 3, pa.float16()))
        if is_exact:
            prepared(warehouse, raw, {})
            assert sequences_of(warehouse) == {"2048": ["a", "b", "a"]}
        else:
            assert "row 1: user_id is 2050" in _refused(raw)
