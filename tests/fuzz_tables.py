"""Strategies of raw tables for the fuzzer: CSV, TSV, JSONL, Parquet and lines of words."""

import io
import json
import re
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from pipeline.datasets.importers.registry import IMPORTERS
from tests.fuzz_inputs import LONG, TEXT, FuzzInput

_COLUMNS = (
    "user_id", "item_id", "timestamp", "title", "text", "image", "video", "id", "user", "item",
    "description", "rating", "", " item_id", "ITEM_ID", "a b", 'q"q', "x,y", "é", "n\nl", "select",
    "row", "ordinal", "path", "attributes", "filename", "userId", "movieId", "genres", "\0",
)  # fmt: skip
_USUAL = ("title", "title", "text", "image", "description", "price", "brand", "timestamp")
_CELLS = (
    "a", "b", "c", "1", "2", "3", "1.0", "nan", "NULL", "", " ", "-1", "1e400",
    "99999999999999999999",
    "2020-01-01", "2020-01-01T00:00:00Z", '"', '""', '"a', 'a"b', "a,b", "a\nb", "a\rb", "\t", "'",
    "\0", "\x1b[31m", "\u202e", "\ufeff", "é", "e\u0301", "漢", "😀", "x" * 3000,
    "../../odd/binary",
    "/dev/zero", "images/a.jpg", "file:///etc/hostname", "https://a.b/c", "{}", "[1, 2]", "true",
    '{"a": 1}', ";", "|", "::", "raw.lmdb:a", "images.tar:a",
)  # fmt: skip


@st.composite
def _header(draw: st.DrawFn, required: tuple[str, ...]) -> list[str]:
    """Return names of columns: the required ones, mostly, and some others."""
    odd = draw(st.integers(0, 9)) == 0
    names = st.sampled_from(_COLUMNS if odd else [*_USUAL, *_COLUMNS])
    extra = draw(st.lists(names, max_size=3, unique=not odd))
    extra = extra if odd else [name for name in extra if name.lower().strip() not in required]
    columns = [*required, *extra]
    if draw(st.integers(0, 30)) == 0:
        columns = columns[1:]
    return columns


def _bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Return the bytes of a table, at times with a mark, other line ends, or bytes of no text."""
    kind = draw(st.integers(0, 40))
    if kind == 0:
        return b"\xef\xbb\xbf" + content
    if kind == 1:
        return content.replace(b"\n", draw(st.sampled_from((b"\r\n", b"\r", b"\n\n", b"\n\r"))))
    if kind == 2:
        return content + draw(st.sampled_from((b"\xff\xfe", b"\0", b'"', b"\x1a", b"\xed\xa0\x80")))
    if kind == 3:
        return content[: draw(st.integers(0, len(content)))]
    if kind == 4:
        return draw(st.binary(max_size=60))
    return content


@st.composite
def _delimited(draw: st.DrawFn, required: tuple[str, ...], delimiter: str) -> bytes:
    """Return CSV or TSV, with odd cells and rows of another width in some files."""
    columns = draw(_header(required))
    plain, odd = st.sampled_from("abc12"), st.one_of(st.sampled_from(_CELLS), TEXT)
    share = draw(st.sampled_from((0, 1, 4)))
    widths = draw(st.sampled_from(((0,),) * 6 + ((0, 0, 1, -1),)))
    is_quoted = draw(st.integers(0, 3)) > 0
    rows = []
    for number in range(draw(st.integers(0, 5))):
        cells = []
        for index in range(max(0, len(columns) + draw(st.sampled_from(widths)))):
            name = columns[index] if index < len(columns) else ""
            if name in required and "user_id" not in required and share < 4:
                cell = "abc12"[number]  # items are listed once
            elif name == "timestamp" and share < 4:
                cell = str(draw(st.integers(0, 5)))
            else:
                cell = draw(odd if draw(st.integers(0, 9)) < share else plain)
            cells.append(cell)
        if is_quoted:
            cells = ['"' + text.replace('"', '""') + '"' for text in cells]
        rows.append(delimiter.join(cells))
    text = "\n".join([delimiter.join(columns), *rows]) + draw(st.sampled_from(("\n", "\n", "")))
    return _bytes(draw, text.encode("utf-8", "surrogatepass"))


@st.composite
def _jsonl(draw: st.DrawFn) -> bytes:
    leaves = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(_CELLS)
    )
    value = st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=2),
            st.dictionaries(st.sampled_from(_COLUMNS), inner, max_size=2),
        ),
        max_leaves=3,
    )
    lines = []
    for number in range(draw(st.integers(0, 4))):
        keys = st.sampled_from((*_USUAL, *_COLUMNS))
        row = draw(st.dictionaries(keys, value, max_size=3))
        identity = draw(st.one_of(*[st.just("abc12"[number])] * 6, value))
        lines.append(json.dumps({"item_id": identity, **row}))
    if draw(st.integers(0, 15)) == 0:
        lines.append(draw(st.sampled_from(("[]", "1", "null", "{", '"a"', "[" * LONG, "{}{}"))))
    return _bytes(draw, ("\n".join(lines) + "\n").encode())


_ARROW_TYPES: tuple[pa.DataType, ...] = (
    pa.string(), pa.string(), pa.string(), pa.int64(), pa.int64(), pa.large_string(), pa.binary(),
    pa.int8(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.bool_(), pa.null(),
    pa.date32(), pa.date64(), pa.time32("s"), pa.time64("ns"), pa.timestamp("s"),
    pa.timestamp("ns", "Europe/Berlin"), pa.timestamp("us", "+05:30"), pa.duration("ns"),
    pa.duration("s"), pa.decimal128(5, 2), pa.decimal128(38, 0), pa.decimal256(60, 3),
    pa.list_(pa.string()), pa.large_list(pa.int32()), pa.list_(pa.int32(), 2), pa.list_(pa.list_(
    pa.float32())), pa.struct([("a", pa.int32()), ("b", pa.string())]), pa.struct([("bytes",
    pa.binary()), ("path", pa.string())]), pa.map_(pa.string(), pa.float64()), pa.dictionary(
    pa.int8(), pa.string()), pa.binary(3), pa.list_(pa.struct([("x", pa.float64())])),
    pa.dictionary(pa.int32(), pa.int64()),
)  # fmt: skip


_ID_TYPES: tuple[pa.DataType, ...] = (
    pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string()), pa.int64(), pa.int8(),
    pa.uint64(), pa.float32(), pa.decimal128(9, 0),
)  # fmt: skip


def _arrow_value(kind: pa.DataType) -> st.SearchStrategy[Any]:
    """Return values of an Arrow type, with nulls and extremes."""
    if pa.types.is_dictionary(kind):
        return _arrow_value(kind.value_type)
    if pa.types.is_null(kind):
        return st.none()
    if pa.types.is_boolean(kind):
        return st.one_of(st.none(), st.booleans())
    if pa.types.is_floating(kind):
        small = (0.0, -0.0, 1.0, 2.0, 1.5, float("nan"), float("inf"), 2048.0)
        return st.one_of(st.none(), st.sampled_from(small))
    if pa.types.is_fixed_size_binary(kind):
        return st.one_of(st.none(), st.binary(min_size=3, max_size=3))
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return st.one_of(st.none(), st.binary(max_size=9), st.just(b"\x89PNG\r\n\x1a\n"))
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return st.one_of(st.sampled_from(("a", "b", "c", None)), st.sampled_from(_CELLS))
    if pa.types.is_map(kind):
        pairs = st.tuples(st.sampled_from(("a", "b")), _arrow_value(kind.item_type))
        return st.one_of(st.none(), st.lists(pairs, max_size=2, unique_by=lambda pair: pair[0]))
    if pa.types.is_struct(kind):
        fields = {part.name: _arrow_value(part.type) for part in kind}
        return st.one_of(st.none(), st.fixed_dictionaries(fields))
    if pa.types.is_nested(kind):
        size = getattr(kind, "list_size", None)
        value = _arrow_value(kind.value_type)
        lists = st.lists(value, min_size=size or 0, max_size=size or 2)
        return st.one_of(st.none(), lists)
    if pa.types.is_decimal(kind):
        return st.one_of(st.none(), st.integers(-99, 99))
    bits = getattr(kind, "bit_width", 64)
    low = 0 if str(kind).startswith("uint") else -(2 ** (bits - 1))
    if pa.types.is_time(kind):
        return st.one_of(st.none(), st.integers(0, 86_399))
    if pa.types.is_integer(kind):
        edges = (low, 2 ** (bits - 1) - 1)
        return st.one_of(st.none(), st.integers(0, 3), st.sampled_from(edges))
    extreme = 2**62 if bits == 64 else 2**30
    return st.one_of(st.none(), st.sampled_from((0, 1, 86_400_000, -86_400_000, extreme, -extreme)))


@st.composite
def _parquet(draw: st.DrawFn, required: tuple[str, ...]) -> bytes:
    """Return a Parquet file whose columns have any type."""
    columns = draw(_header(required))
    rows = draw(st.integers(0, 4))
    arrays = []
    for name in columns:
        kind = draw(st.sampled_from(_ARROW_TYPES))
        values = draw(st.lists(_arrow_value(kind), min_size=rows, max_size=rows))
        if name in required and draw(st.integers(0, 9)):
            kind = draw(st.sampled_from(_ID_TYPES))
            is_listing = "user_id" not in required
            values = list(range(rows)) if is_listing else [draw(st.integers(0, 2)) for _ in values]
            values = [str(value) for value in values] if kind in _ID_TYPES[:3] else values
        try:
            arrays.append(pa.array(values, kind))
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            arrays.append(pa.nulls(rows, kind))
    sink = io.BytesIO()
    try:
        pq.write_table(pa.Table.from_arrays(arrays, names=columns), sink)
    except (pa.ArrowException, ValueError):
        return b"PAR1"
    return _bytes(draw, sink.getvalue())


@st.composite
def _lines(draw: st.DrawFn) -> bytes:
    """Return lines of words, for the layouts without a header."""
    words = st.lists(st.one_of(st.sampled_from("abc12"), st.sampled_from(_CELLS)), max_size=4)
    gap = draw(st.sampled_from((" ", "\t", ",", "::", "|")))
    lines = [gap.join(draw(words)) for _ in range(draw(st.integers(0, 4)))]
    return _bytes(draw, ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass"))


@st.composite
def raw_tables(draw: st.DrawFn) -> FuzzInput:
    """Return ``mmrec prepare`` of odd raw files, and queries of the result."""
    format = draw(st.sampled_from(("table",) * 5 + tuple(IMPORTERS)))
    files: dict[str, bytes] = {}
    for role, patterns in IMPORTERS[format].files.items():
        names = [name for name in patterns if re.search(r"\.[a-z]+$", name) and "*" not in name]
        names = [name for name in names if not name.endswith((".lmdb", ".tar"))]
        if not names or draw(st.integers(0, 40)) == 0:
            continue
        name = draw(st.sampled_from(names))
        required = ("user_id", "item_id") if role == "interactions" else ("item_id",)
        if format == "movielens":
            required = ("userId", "movieId") if role == "interactions" else ("movieId", "title")
        kind = name.rpartition(".")[2]
        strategy = {
            "csv": _delimited(required, ","),
            "tsv": _delimited(required, "\t"),
            "parquet": _parquet(required),
            "jsonl": _jsonl(),
        }.get(kind, _lines())
        files[f"in/{name}"] = draw(strategy)
    others = st.sampled_from(("--ties=id", "--ties=hash", "--k-core=1", "--k-core=2", "--json"))
    options = draw(st.lists(others, max_size=1))
    options += draw(st.sampled_from((["--unlisted=keep"],) * 5 + (["--unlisted=drop"], [])))
    prepare = ("prepare", "--dataset", "odd", "--format", format, "--raw", "in", *options)
    after = (
        ("sql", "SELECT * FROM items", "--json"),
        ("sql", "SELECT * FROM interactions JOIN items USING (dataset, item)"),
        ("extract", "--dataset", "odd", "--text", "hashed"),
        ("extract", "--dataset", "odd", "--image", "hashed"),
        ("datasets",),
    )
    return FuzzInput(
        commands=(prepare, *draw(st.sampled_from([(command,) for command in after]))), files=files
    )
