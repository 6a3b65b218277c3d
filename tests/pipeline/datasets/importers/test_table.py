import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.errors import UserError
from features.warehouse import Warehouse
from pipeline.media.reader import MediaReader
from tests.pipeline.datasets.raws import (
    INTERACTIONS,
    ITEMS,
    folder,
    items_of,
    prepared,
    sequences_of,
)


def _refused(tmp_path: Path, content: dict[str, str | bytes]) -> str:
    warehouse = Warehouse(tmp_path / "none")
    with pytest.raises(UserError) as caught:
        prepared(warehouse, tmp_path / "raw", content)
    assert not warehouse.root.exists()
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(tmp_path / "raw") + "/", "")


def test_a_line_without_end_is_named_and_not_repeated(tmp_path: Path) -> None:
    items = f"{ITEMS}d,{'x' * 2_100_000}\n"
    message = _refused(tmp_path, {"interactions.csv": INTERACTIONS, "items.csv": items})
    assert message.startswith("items.csv, line 5: ")
    assert "2,000,000 bytes" in message
    assert len(message) < 200


@pytest.mark.parametrize(
    ("name", "delimiter", "first"),
    [("items.csv", ",", True), ("items.csv", ",", False), ("items.tsv", "\t", True)],
)
def test_a_column_without_a_name_is_an_attribute(
    warehouse: Warehouse, tmp_path: Path, name: str, delimiter: str, first: bool
) -> None:
    rows = [["", "item_id", "title"], ["0", "a", "Salt"], ["1", "b", "Tea"], ["2", "c", "Rice"]]
    rows = rows if first else [[*row[1:], row[0]] for row in rows]
    text = "".join(delimiter.join(row) + "\n" for row in rows)
    prepared(warehouse, tmp_path / "raw", {"interactions.csv": INTERACTIONS, name: text})
    items = items_of(warehouse)
    assert [item["text"] for item in items] == ["Salt", "Tea", "Rice"]
    assert f'"column{1 if first else 3}":"0"' in items[0]["attributes"]


@pytest.mark.parametrize("blank", [" ", "\t", "   "])
@pytest.mark.parametrize("items", ["items.csv", "items.parquet", "items.jsonl"])
def test_blanks_around_ids_are_not_part_of_them(tmp_path: Path, items: str, blank: str) -> None:
    def read(name: str, blank: str) -> list[object]:
        lines = INTERACTIONS.splitlines()
        rows = [line.split(",") for line in lines[1:]]
        rows = [[f"{user}{blank * (i % 2)}", blank + item, *rest] for i, (user, item, *rest) in
                enumerate(rows)]  # fmt: skip
        raw = tmp_path / name
        raw.mkdir()
        ids = [f"{item}{blank}" for item in "abc"]
        if items == "items.csv":
            text = "".join(f"{item_id},Salt\n" for item_id in ids)
            (raw / items).write_text(f"item_id,title\n{text}")
        elif items == "items.jsonl":
            pairs = [{"item_id": item_id, "title": "Salt"} for item_id in ids]
            (raw / items).write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
        else:
            pq.write_table(pa.table({"item_id": ids, "title": ["Salt"] * 3}), raw / items)
        warehouse = Warehouse(tmp_path / f"{name}-warehouse")
        text = "\n".join([lines[0], *(",".join(row) for row in rows)])
        prepared(warehouse, raw, {"interactions.csv": f"{text}\n"})
        return [sequences_of(warehouse), [item["item_id"] for item in items_of(warehouse)]]

    assert read("blank", blank) == read("plain", "")


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_damaged_pages_of_ids_are_one_line(tmp_path: Path, compression: str) -> None:
    ids = pa.table({"user_id": [1.0, 2.0] * 500, "item_id": ["a", "b"] * 500})
    pq.write_table(ids, tmp_path / "ids.parquet", compression=compression)
    content = bytearray((tmp_path / "ids.parquet").read_bytes())
    content[4:60] = b"\xff" * 56  # header of the first page
    message = _refused(tmp_path, {"interactions.parquet": bytes(content), "items.csv": ITEMS})
    assert message.startswith("interactions.parquet")


def test_interactions_may_have_several_columns_without_a_name(
    warehouse: Warehouse, tmp_path: Path
) -> None:
    header, *rows = INTERACTIONS.splitlines()
    lines = [f",{header},", *(f"{number},{row},x" for number, row in enumerate(rows))]
    content = {"interactions.csv": "\n".join(lines) + "\n", "items.csv": ITEMS}
    assert prepared(warehouse, tmp_path / "raw", content).interactions == len(rows)


def test_every_column_finds_its_place(warehouse: Warehouse, tmp_path: Path) -> None:
    items = (
        "Item_ID,title,description,image,video,price\n"
        'a,Salt &amp; pepper,"two\n lines\t here",pictures/a.png,,1.50\n'
        "b,,  ,,clips/b.mp4,\n"
        'c,"say ""cheese""",,,,2\n'
    )
    media = dict.fromkeys(("images/c.JPG", "pictures/a.png", "clips/b.mp4"), "x")
    content = {"interactions.csv": INTERACTIONS, "items.csv": items, **media}
    prepared(warehouse, tmp_path / "raw", content)
    assert items_of(warehouse) == [
        {
            "item": 0,
            "item_id": "a",
            "text": "Salt & pepper. two lines here",
            "image": "pictures/a.png",
            "video": None,
            "attributes": '{"title":"Salt &amp; pepper","description":"two\\n lines\\t here",'
            '"price":"1.50"}',
        },
        {
            "item": 1,
            "item_id": "b",
            "text": None,
            "image": None,
            "video": "clips/b.mp4",
            "attributes": '{"description":"  "}',
        },
        {
            "item": 2,
            "item_id": "c",
            "text": 'say "cheese"',
            "image": "images/c.JPG",
            "video": None,
            "attributes": '{"title":"say \\"cheese\\"","price":"2"}',
        },
    ]


def test_parquet_is_read_with_its_types(warehouse: Warehouse, tmp_path: Path) -> None:
    raw = folder(tmp_path / "raw", {})
    pq.write_table(
        pa.table({"user_id": [1, 1, 2], "item_id": [10, 9, 10], "timestamp": [2.0, 1.0, 5.0]}),
        raw / "interactions.parquet",
    )
    pq.write_table(
        pa.table({"item_id": [10, 9], "title": ["Ten", None], "tags": [["x", "y"], []]}),
        raw / "items.parquet",
    )
    prepared(warehouse, raw, {})
    assert sequences_of(warehouse) == {"1": ["9", "10"], "2": ["10"]}
    assert [(row["text"], row["attributes"]) for row in items_of(warehouse)] == [
        (None, '{"tags":[]}'),
        ("Ten", '{"title":"Ten","tags":["x","y"]}'),
    ]


@pytest.mark.parametrize(
    ("time", "kept"),
    [("7", 7), ("-7", -7), ("7.0", 7), ("1e3", 1000), (" 7 ", 7), ("1700000000123", 1700000000123)],
)
def test_whole_numbers_are_times(
    warehouse: Warehouse, tmp_path: Path, time: str, kept: int
) -> None:
    content = {"interactions.csv": f"user_id,item_id,timestamp\nu,a,{time}\n", "items.csv": ITEMS}
    prepared(warehouse, tmp_path / "raw", content)
    table = pq.read_table(warehouse.dataset_dir("mine") / "interactions")
    assert table["timestamp"].to_pylist() == [kept]


@pytest.mark.parametrize(
    "time", ["2020-02-30", "1.5", "nan", "inf", "-inf", "1e30", "99999999999999999999", "x", ""]
)
def test_anything_else_is_no_time(tmp_path: Path, time: str) -> None:
    interactions = INTERACTIONS + f"w,a,{time}\nw,b,nonsense\n"
    message = _refused(tmp_path, {"interactions.csv": interactions, "items.csv": ITEMS})
    value = repr(time) if time else "empty"
    assert message.startswith("interactions.csv, row 5: ")
    assert value in message
    assert "integers" in message


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("interactions.csv", "uid,item_id\nu,a\n", r"interactions\.csv .*'user_id'.*uid, item_id;"),
        ("interactions.csv", "u,i\nu,a\n", r"'user_id'.*'item_id'.*u, i;.*--columns user="),
        ("interactions.csv", "user_id;item_id\nu;a;b\n", "line 2: 3 columns.*2.*correct"),
        ("interactions.csv", "user_id,item_id\ru,a\r", "carriage return.*line feeds"),
        ("items.csv", "item_id,title\ra,caf\u00e9\rb,y\r", "carriage return.*line feeds"),
        ("interactions.csv", "", r"interactions\.csv, line 1: .*empty.*name"),
        ("interactions.csv", "user_id,item_id\n", r"interactions\.csv .*--file interactions=PATH"),
        ("interactions.csv", "user_id,item_id\nu,a\n,b\n", "row 2: user_id .*remove"),
        ("interactions.csv", "user_id,item_id\nu,a\nu,\n", "row 2: item_id .*remove"),
        (
            "interactions.csv",
            "user_id,item_id\nu,a\n,b\nu,\n,\n,c\n",
            r"row 2: user_id .*3 rows \(2, 4, 5\).*row 3: item_id .*2 rows \(3, 4\)",
        ),
        (
            "interactions.csv",
            "user_id,item_id\nu,a\nu\nu,b,c\nv,a\nu\nu\n",
            r"line 3: 1 columns.*2.*4 lines \(such as 3, 4, 6\)",
        ),
        ("interactions.csv", "user_id,item_id\nu,a\nu\n", "line 3: 1 columns.*2.*correct"),
        ("interactions.csv", "user_id,item_id\nu,a\nu,b,c\n", "line 3: 3 columns.*2.*correct"),
        ("items.csv", "item_id,title,Title\na,x,y\n", "line 1: 'title', 'Title' .*name"),
        ("items.csv", "name,title\na,x\n", r"items\.csv .*'item_id' or .*name, title.*rename"),
        ("items.csv", ITEMS + "b,again\nc,again\n", r"items\.csv .*2 items .*'b', 'c'.*keep"),
        ("items.csv", ITEMS + ",nobody\n", r"items\.csv: 1 item without an id.*row \(4\).*remove"),
        ("items.csv", "item_id,title\na,\nb,\nc,  \n", r"items\.csv: .*empty.*3 items.*fill"),
        ("items.csv", 'item_id,title\na,"x\nb,y\nc,z\n', "line 2: .*quote.*correct"),
    ],
)  # fmt: skip
def test_mistakes_in_the_files(tmp_path: Path, name: str, text: str, expected: str) -> None:
    content: dict[str, str | bytes] = {"interactions.csv": INTERACTIONS, "items.csv": ITEMS}
    assert re.search(expected, _refused(tmp_path, {**content, name: text}))


@pytest.mark.parametrize("quote", ['"', ""])
@pytest.mark.parametrize("size", [3_000_000, 40_000_000])
def test_a_field_that_is_too_long(tmp_path: Path, quote: str, size: int) -> None:
    items = f"item_id,title\na,{quote}{'x' * size}{quote}\nb,y\n"
    message = _refused(tmp_path, {"interactions.csv": INTERACTIONS, "items.csv": items})
    assert "2,000,000 bytes" in message
    assert "use Parquet" in message


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("items.csv", b"item_id,title\na,x\nb,caf\xe9\nc,z\n", 3),
        ("items.csv", b"item_id,tit\xe9l\na,x\n", 1),
        ("interactions.csv", b"user_id,item_id\nu,a\nu,b\nv\xff,a\n", 4),
    ],
)
def test_text_that_is_not_utf8(tmp_path: Path, name: str, text: bytes, line: int) -> None:
    content: dict[str, str | bytes] = {"interactions.csv": INTERACTIONS, "items.csv": ITEMS}
    message = _refused(tmp_path, {**content, name: text})
    assert message.startswith(f"{name}, line {line}: ")
    assert "UTF-8" in message


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    content: dict[str, str | bytes] = {"interactions.parquet": b"no" * 50, "items.csv": ITEMS}
    assert re.search("interactions.parquet .*Parquet.*copy", _refused(tmp_path, content))


def test_a_missing_file_names_what_was_looked_for(tmp_path: Path) -> None:
    message = _refused(tmp_path, {"items.csv": ITEMS})
    assert "interactions.parquet or interactions.csv or interactions.tsv" in message
    assert "--file interactions=PATH" in message


def test_files_and_folders_by_option(warehouse: Warehouse, tmp_path: Path) -> None:
    folder(tmp_path / "elsewhere", {"things.jsonl": '{"id": "a", "name": "A"}\n', "art/a.png": "x"})
    prepared(
        warehouse,
        tmp_path / "raw",
        {"log.tsv": "user_id\titem_id\nu\ta\n"},
        files={
            "interactions": "log.tsv",
            "items": str(tmp_path / "elsewhere" / "things.jsonl"),
            "images": str(tmp_path / "elsewhere" / "art"),
        },
    )
    (item,) = items_of(warehouse)
    art = tmp_path / "elsewhere" / "art" / "a.png"
    assert (item["text"], item["image"]) == ("A", f"outside:{art}")
    assert MediaReader(tmp_path / "raw").read(item["image"]) == b"x"


SECOND = 1_577_836_800  # 2020-01-01


@pytest.mark.parametrize(
    ("kind", "first", "unit"),
    [
        (pa.timestamp("s"), SECOND * 1_000_000, "microseconds"),
        (pa.timestamp("ms"), SECOND * 1_000_000, "microseconds"),
        (pa.timestamp("us", tz="Europe/Berlin"), SECOND * 1_000_000, "microseconds"),
        (pa.timestamp("ns"), SECOND * 1_000_000_000, "nanoseconds"),
        (pa.date32(), 18_262, "days"),
    ],
)
def test_dates_and_times_of_parquet(
    warehouse: Warehouse, tmp_path: Path, kind: pa.DataType, first: int, unit: str
) -> None:
    days = 18_262 if pa.types.is_date(kind) else SECOND
    steps = 1 if pa.types.is_date(kind) else 86_400
    scale = {"s": 1, "ms": 1000, "us": 10**6, "ns": 10**9}[getattr(kind, "unit", "s")]
    times = pa.array([days * scale, (days - steps) * scale], pa.int64())
    if pa.types.is_date(kind):
        times = times.cast(pa.int32())
    raw = folder(tmp_path / "raw", {"items.csv": ITEMS})
    rows = {"user_id": ["u", "u"], "item_id": ["a", "b"], "timestamp": times.cast(kind)}
    pq.write_table(pa.table(rows), raw / "interactions.parquet")
    notes: list[str] = []
    info = prepared(warehouse, raw, {}, notify=notes.append)
    assert info.timestamps
    assert sequences_of(warehouse) == {"u": ["b", "a"]}
    table = pq.read_table(warehouse.dataset_dir("mine") / "interactions")
    assert table["timestamp"].to_pylist()[1] == first
    assert any(f" {unit} since 1970" in note for note in notes)


def test_a_time_that_is_missing_in_parquet(tmp_path: Path) -> None:
    raw = folder(tmp_path / "raw", {"items.csv": ITEMS})
    times = pa.array([SECOND, None], pa.timestamp("us"))
    rows = {"user_id": ["u", "u"], "item_id": ["a", "b"], "timestamp": times}
    pq.write_table(pa.table(rows), raw / "interactions.parquet")
    assert _refused(tmp_path, {}).startswith("interactions.parquet, row 2: the timestamp")


@pytest.mark.parametrize("n_bytes", [2_100_000, 33_000_000, 70_000_000])
@pytest.mark.parametrize("position", ["first", "last"])
@pytest.mark.parametrize("end", ["\n", ""])
def test_a_long_line_is_refused_wherever_it_is(
    tmp_path: Path, n_bytes: int, position: str, end: str
) -> None:
    long_line, short_lines = f"u,{'x' * n_bytes},7", ["u,a,1", "u,b,2", "v,a,1", "v,b,5"]
    lines = [long_line, *short_lines] if position == "first" else [*short_lines, long_line]
    files: dict[str, str | bytes] = {
        "interactions.csv": "\n".join(["user_id,item_id,timestamp", *lines]) + end,
        "items.csv": "item_id,title\na,x\nb,y\n",
    }
    assert re.search("interactions.csv.*2,000,000 bytes.*shorten", _refused(tmp_path, files))
