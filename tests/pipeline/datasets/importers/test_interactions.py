"""Times of interactions in text files: ISO 8601, whole numbers of any unit, and mixtures."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.errors import UserError
from features.warehouse import Warehouse
from tests.pipeline.datasets.raws import ITEMS, folder, prepared, sequences_of

NEW_YEAR = 1_577_836_800  # 2020-01-01T00:00:00Z
DAY = 18_262


def _table(*times: str) -> dict[str, str | bytes]:
    """Return the files of the user u with the items a, b and c at these times."""
    rows = "".join(f"u,{item},{time}\n" for item, time in zip("abc", times, strict=False))
    return {"interactions.csv": f"user_id,item_id,timestamp\n{rows}", "items.csv": ITEMS}


def _times(warehouse: Warehouse) -> list[int]:
    table = pq.read_table(warehouse.dataset_dir("mine") / "interactions")
    return [int(value) for value in table["timestamp"].to_pylist()]


@pytest.mark.parametrize(
    ("times", "unit", "stored"),
    [
        (("2020-01-03", "2020-01-01", "1969-12-31"), "days", [-1, DAY, DAY + 2]),
        (
            ("2020-01-01T10:00:00", "2020-01-01T09:59:59.5", "2020-01-01 09:00"),
            "microseconds",
            [(NEW_YEAR + second) * 10**6 + micro
             for second, micro in ((32_400, 0), (35_999, 500_000), (36_000, 0))],
        ),
        (
            ("2020-01-01T10:00:00+02:00", "2020-01-01T07:30:00Z", "2020-01-01 09:00:00+0300"),
            "microseconds",
            [(NEW_YEAR + minutes * 60) * 10**6 for minutes in (360, 450, 480)],
        ),
        (
            ("2020-01-01T00:00:00.000000003Z", "2020-01-01T00:00:00.0000001Z",
             "2020-01-01T00:00:00Z"),
            "nanoseconds",
            [NEW_YEAR * 10**9, NEW_YEAR * 10**9 + 3, NEW_YEAR * 10**9 + 100],
        ),
        (("1577836802", "1577836801.0", "1.5778368e9"), "seconds",
         [NEW_YEAR, NEW_YEAR + 1, NEW_YEAR + 2]),
        (("1577836800002", "1577836800001", "1577836800000"), "milliseconds",
         [NEW_YEAR * 1000 + step for step in range(3)]),
        (("1577836800000002", "1577836800000001", "1577836800000000"), "microseconds",
         [NEW_YEAR * 10**6 + step for step in range(3)]),
        (("3", "2", "1"), None, [1, 2, 3]),
        (("-1577836800", "5", "3"), None, [-NEW_YEAR, 3, 5]),
    ],
)  # fmt: skip
def test_times_are_stored_in_one_unit(
    warehouse: Warehouse,
    tmp_path: Path,
    times: tuple[str, ...],
    unit: str | None,
    stored: list[int],
) -> None:
    notes: list[str] = []
    info = prepared(warehouse, tmp_path / "raw", _table(*times), notify=notes.append)
    assert _times(warehouse) == stored
    assert info.time_unit == unit
    assert any(f"{unit} since 1970" in note for note in notes) == (unit is not None)
    assert info.timestamps


def test_the_order_follows_the_zones(warehouse: Warehouse, tmp_path: Path) -> None:
    times = ("2020-01-01T10:00:00+02:00", "2020-01-01T09:00:00Z", "2020-01-01T09:30:00+01:00")
    prepared(warehouse, tmp_path / "raw", _table(*times))
    assert sequences_of(warehouse) == {"u": ["a", "c", "b"]}  # 8:00, 8:30 and 9:00 in UTC


@pytest.mark.parametrize(
    ("times", "parts"),
    [
        (
            ("1577836800", "1577836800000"),
            ["seconds (1 row, such as 1577836800 in row 1)", "milli"],
        ),
        (("1577836800000", "3", "1577836800000000"), ["milliseconds", "microseconds", "row 3"]),
        (("1577836800", "2020-01-01"), ["whole numbers (1 row, such as '1577836800' in", "ISO"]),
        (("2020-01-01", "2020-01-01T10:00"), ["ISO dates", "without a zone", "row 2"]),
        (("2020-01-01T10:00Z", "2020-01-01T10:00"), ["with a zone", "without a zone"]),
        (("1577836800", "1577836800000", "1577836800001"), ["1 row,", "(2 rows, such as 15778368"]),
    ],
)
def test_a_mixture_is_refused_in_one_line(
    tmp_path: Path, times: tuple[str, ...], parts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        prepared(Warehouse(tmp_path / "none"), tmp_path / "raw", _table(*times))
    message = str(caught.value)
    assert "\n" not in message
    assert "mix" in message
    assert "in one" in message
    assert all(part in message for part in parts)


@pytest.mark.parametrize(
    ("times", "row"),
    [
        (("2020-01-01", "2020-02-30", "2020-01-01"), 2),
        (("2020-01-01", "2020-01-01", ""), 3),
        (("2020-01-01", "yesterday", "2020-01-01"), 2),
        (("2020-01-01T10:61:00", "2020-01-01T10:00:00", "2020-01-01T10:00:00"), 1),
        (("2020-01-01T10", "2020-01-01T10:00:00", "2020-01-01T10:00:00"), 1),
    ],
)
def test_a_time_that_does_not_exist_is_named_with_its_row(
    tmp_path: Path, times: tuple[str, ...], row: int
) -> None:
    with pytest.raises(UserError, match=rf"row {row}: the timestamp is "):
        prepared(Warehouse(tmp_path / "none"), tmp_path / "raw", _table(*times))


def test_iso_times_in_a_column_of_text_of_parquet(warehouse: Warehouse, tmp_path: Path) -> None:
    raw = folder(tmp_path / "raw", {"items.csv": ITEMS})
    times = ["2020-01-02 00:00:00", "2020-01-01 00:00:00"]
    rows = {"user_id": ["u", "u"], "item_id": ["a", "b"], "timestamp": times}
    pq.write_table(pa.table(rows), raw / "interactions.parquet")
    assert prepared(warehouse, raw, {}).time_unit == "microseconds"
    assert _times(warehouse) == [NEW_YEAR * 10**6, (NEW_YEAR + 86_400) * 10**6]


def test_other_layouts_read_iso_times(warehouse: Warehouse, tmp_path: Path) -> None:
    """The ratings of Amazon and MovieLens are read by the same function."""
    movielens = {
        "ratings.csv": "userId,movieId,rating,timestamp\n1,7,5,2020-01-02\n1,8,5,2020-01-01\n",
        "movies.csv": "movieId,title,genres\n7,Seven,Drama\n8,Eight,Drama\n",
    }
    info = prepared(warehouse, tmp_path / "raw", movielens, format="movielens")
    assert info.time_unit == "days"
    assert sequences_of(warehouse) == {"1": ["8", "7"]}


def test_all_rows_without_a_time_are_counted(tmp_path: Path) -> None:
    rows = "".join(f"u{row},a,{'x' if row % 2 else '2020-01-01'}\n" for row in range(10))
    content = {"interactions.csv": f"user_id,item_id,timestamp\n{rows}", "items.csv": ITEMS}
    with pytest.raises(UserError, match=r"row 2: .*'x'.*5 rows \(such as 2, 4, 6\)"):
        prepared(Warehouse(tmp_path / "none"), tmp_path / "raw", content)


@pytest.mark.parametrize("column", ["user_id", "item_id"])
def test_all_rows_without_an_id_are_counted(tmp_path: Path, column: str) -> None:
    rows = "".join("u,\n" if column == "item_id" else ",a\n" for _ in range(4))
    content = {"interactions.csv": f"user_id,item_id\nu,a\n{rows}", "items.csv": ITEMS}
    with pytest.raises(UserError, match=rf"row 2: {column} .*4 rows \(such as 2, 3, 4\)"):
        prepared(Warehouse(tmp_path / "none"), tmp_path / "raw", content)
