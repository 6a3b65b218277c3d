"""Tables and progress on terminals of several widths, in a pipe, and without Unicode."""

import io
import json
import math
import re
from decimal import Decimal

import pytest
from rich.console import Console
from rich.text import Text

from cli import console


def terminal(width: int) -> Console:
    return console.SafeConsole(
        file=io.StringIO(), width=width, force_terminal=True, color_system=None, soft_wrap=True,
        markup=False, highlight=False, emoji=False,
    )  # fmt: skip


def printed(screen: Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def test_a_pipe_receives_plain_aligned_columns(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a-name-that-is-longer-than-any-terminal-is-wide" * 2
    rows = [[name[:70], 1234567, 0.5, None], ["b", 2, 1234.5, True]]
    console.table(["name", "items", "a\nvalue", "cold"], rows, title="title")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "title"
    assert lines[1].split() == ["a"]
    assert lines[2].split() == ["name", "items", "value", "cold"]
    assert lines[3].split() == [name[:70], "1,234,567", "0.5000", "-"]
    assert lines[4].split() == ["b", "2", "1,234.5", "yes"]
    assert lines[2].index("items") + len("items") == lines[4].index(" 2 ") + 2  # on the right
    assert all(line == line.rstrip() and "\x1b" not in line for line in lines)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_terminal_wraps_texts_and_keeps_numbers(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    screen = terminal(width)
    monkeypatch.setattr(console, "out", screen)
    text = "a title of many words which no narrow terminal shows on one line"
    console.table(["item", "text", "score"], [["i1", text, 1234567.25]])
    lines = printed(screen).splitlines()
    assert max(map(len, lines)) <= width
    assert "1,234,567.2" in lines[1]
    assert text in " ".join(re.sub(r"i1|1,234,567.2", "", " ".join(lines[1:])).split())
    console.table(["item", "text", "score"], [["i1", text, 1.5]], wrap=False)
    lines = printed(screen).splitlines()[len(lines) :]
    assert len(lines) == 2
    assert ("…" in lines[1]) == (width < 80)
    assert "1.5000" in lines[1]


def test_a_wide_table_of_few_rows_is_transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = [f"column-{number}" for number in range(9)]
    for width, lines in ((80, 9), (120, 2)):
        screen = terminal(width)
        monkeypatch.setattr(console, "out", screen)
        console.table(columns, [range(9)], transpose=True)
        shown = printed(screen).splitlines()
        assert len(shown) == lines
        assert max(map(len, shown)) <= width


def test_cells_keep_their_style_and_headings_are_no_markup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=80)
    monkeypatch.setattr(console, "out", screen)
    console.table(["[b]"], [[Text("best", "bold")], ["[i]x"]])
    assert "[b]" in printed(screen)
    assert "\x1b[1mbest" in printed(screen)
    assert "[i]x" in printed(screen)


def test_without_unicode_nothing_is_printed_as_an_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    screen = Console(file=stream, width=40, force_terminal=True, color_system=None)
    monkeypatch.setattr(console, "out", screen)
    console.table(["a", "b"], [["x" * 60, console.format_spread(0.0123)]], wrap=False)
    stream.flush()
    assert isinstance(stream.buffer, io.BytesIO)
    assert stream.buffer.getvalue().decode("ascii").split()[-1] == "+-.0123"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (True, "yes"), (1234567, "1,234,567"), (0.12345, "0.1235"),
        (12345.67, "12,345.7"), (Decimal(3), "3"), ([1, 2, 3, 4, 5], "[1, 2, 3, ... 5]"),
        ("a\n b", "a b"), ("x" * 100, "x" * 77 + "..."),
    ],
)  # fmt: skip
def test_values(value: object, text: str) -> None:
    assert console.format_value(value) == text


def test_durations() -> None:
    shown = [console.format_duration(value) for value in (0.4, 8, 200, 7500, math.inf)]
    assert shown == ["0s", "8s", "3m20s", "2h05m", "?"]


def test_json_has_null_for_what_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    console.emit_json({"a": [math.nan, math.inf, Decimal("0.5")], "b": "é"})
    assert json.loads(capsys.readouterr().out) == {"a": [None, None, 0.5], "b": "é"}


def test_a_pipe_receives_progress_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(file=io.StringIO(), width=10_000)
    monkeypatch.setattr(console, "err", screen)
    with console.ProgressLine() as line:
        for step in range(1000):
            line.update(f"step {step}", share=step / 1000)
        line.update("epoch 1", keep=True)
    assert printed(screen).splitlines() == ["step 0", "epoch 1"]


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_the_whole_progress(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    screen = terminal(width)
    monkeypatch.setattr(console, "err", screen)
    name = "image by open_clip:ViT-B-32/laion2b_s34b_b79k:"
    figures = "456,789 of 1,000,000, 1,234.5/s, 3h20m left, 1234 failed"
    with console.ProgressLine() as line:
        line.update(f"{name} {figures}", share=0.5)
        shown = printed(screen)
        console.notify("a message")
        line.update("the epoch's figures", keep=True)
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "\n", shown)
    lines = [text.rstrip() for text in re.split(r"[\r\n]+", plain) if text.strip()]
    assert max(map(len, lines)) <= width
    assert "━━━" in plain
    assert f"{name} {figures}" in " ".join(" ".join(lines).replace("━", " ").split())
    after = printed(screen)
    assert after.index("a message") < after.index("the epoch's figures")


@pytest.mark.parametrize(("width", "tables"), [(30, 3), (60, 1)])
def test_columns_that_do_not_fit_are_stacked(
    monkeypatch: pytest.MonkeyPatch, width: int, tables: int
) -> None:
    screen = terminal(width)
    monkeypatch.setattr(console, "out", screen)
    groups = [[(f"{name}\nfiltered", [0.25]), (f"{name}\nkept", [0.5])] for name in "abc"]
    console.stacked_tables([("metric", ["MRR"])], groups, title="test")
    lines = printed(screen).splitlines()
    assert max(map(len, lines)) <= width
    assert lines.count("test") == 1
    rows = [line.split() for line in lines if line.startswith("MRR")]
    assert rows == [["MRR", *["0.2500", "0.5000"] * (3 // tables)]] * tables


def test_a_terminal_without_control_codes_receives_plain_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    screen = terminal(80)
    monkeypatch.setattr(console, "err", screen)
    with console.ProgressLine(interval=0.0) as line:
        line.update("encoding", share=0.5)
    assert printed(screen) == "encoding\n"


@pytest.mark.parametrize(
    "control", ["\x1b[31m", "\u202e", "\x9b31m", "\x07", "\u2066", "\u2028", "\x00", "\r"]
)
def test_control_characters_are_escaped_everywhere_but_in_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], control: str
) -> None:
    screen, messages = terminal(80), terminal(80)
    monkeypatch.setattr(console, "out", screen)
    monkeypatch.setattr(console, "err", messages)
    text = f"a{control}b"
    console.notify(text)
    console.print_text(text)
    console.out.print(text)
    console.table([text], [[text], [Text(text)]], title=text)
    with console.ProgressLine() as line:
        line.update(text, keep=True)
    for shown in (printed(screen), printed(messages)):
        assert shown.replace("\n", "").isprintable()
    console.emit_json([text])
    assert json.loads(capsys.readouterr().out) == [text]
