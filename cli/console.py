"""How results and progress look: tables on standard output, messages on standard error."""

import json
import math
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console

# Without a terminal nothing is wrapped at 80 columns: a pipe has no width.
_LONGEST = 80  # characters of one cell; --json and --csv give all
_NARROW = 12  # characters to which a cell of text may be cut on a narrow terminal
_WIDTH = None if sys.stdout.isatty() else 200
_NUMBER = re.compile(
    r"-|[-+]?[\d,.]+(e[-+]?\d+)?%?( \[.*\])?|\[.*\]"
)  # with its interval; a vector
out = Console(highlight=False, soft_wrap=True, width=_WIDTH)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def notify(message: str) -> None:
    """Tell the person at the terminal something, on standard error."""
    err.print(message, markup=False)


def emit_json(document: Any) -> None:
    """Print the one JSON document of a command; what is no number becomes null."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    sys.stdout.write(json.dumps(_finite(document), ensure_ascii=not unicode, default=str) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Decimal):  # sums of integers come as these
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None
) -> None:
    """Print a table; numbers are aligned on the right and whole, long texts give way to them."""
    cells = [[cell(value) for value in row] for row in rows]
    numeric = [
        bool(cells) and all(_is_number(row[index]) for row in cells)
        for index in range(len(columns))
    ]
    widths = [
        max(map(cell_len, (*column.split("\n"), *(row[index] for row in cells))))
        for index, column in enumerate(columns)
    ]
    natural = list(widths)
    while sum(widths) + 2 * (len(widths) - 1) > out.width:
        wide = [i for i, width in enumerate(widths) if width > _NARROW and not numeric[i]]
        if not wide:
            widths = natural  # the terminal wraps these lines
            break
        widths[max(wide, key=widths.__getitem__)] -= 1
    heads = [column.split("\n") for column in columns]
    tallest = max(map(len, heads))
    heads = [[""] * (tallest - len(head)) + head for head in heads]
    if title:
        out.print(title, style="bold", markup=False)
    for head in zip(*heads, strict=True):
        out.print(_row(head, widths, numeric), style="bold", markup=False)
    for row in cells:
        out.print(_row(row, widths, numeric), markup=False)


def sheet(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table of few rows, on its side where the terminal is too narrow for it."""
    lines = [columns, *([cell(value) for value in row] for row in rows)]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    if sum(widths) + 2 * (len(widths) - 1) > out.width:
        columns, *rows = list(zip(columns, *rows, strict=True))
    table(columns, rows)


def _row(texts: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> str:
    """One line; widths are those of a terminal, where some characters take two columns."""
    fitted = []
    for text, width, right in zip(texts, widths, numeric, strict=True):
        shown = text if cell_len(text) <= width else set_cell_size(text, width - 1) + "…"
        space = " " * (width - cell_len(shown))
        fitted.append(space + shown if right else shown + space)
    return "  ".join(fitted).rstrip()


def cell(value: Any) -> str:
    """How one value stands in a table."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Decimal):
        value = _finite(value)
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 1000 else f"{value:,.1f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple) and len(value) > 4:
        head = ", ".join(cell(entry) for entry in value[:3])
        return f"[{head}, ... {len(value)}]"
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None


def seconds(value: float) -> str:
    """A duration for people: ``8s``, ``3m20s``, ``2h05m``."""
    if not math.isfinite(value):
        return "?"
    whole = round(value)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def bar(done: int, total: int, width: int = 16) -> str:
    """A bar for a live line, with a space behind it; nothing where there is no terminal."""
    if not err.is_terminal or not total:
        return ""
    filled = width * min(done, total) // total
    return "━" * filled + "╌" * (width - filled) + " "


def fit(head: str, name: str, bar: str, tail: str) -> str:
    """Make a live line that the terminal has room for: the bar goes, then some of the name."""
    if not err.is_terminal:
        return f"{head}{name}: {tail}"
    room = err.width - 3 - len(head) - len(tail)
    if len(name) + len(bar) > room:
        bar = ""
    if len(name) > room:
        name = name[: max(3, room - 1)] + "…"
    return f"{head}{name}: {bar}{tail}"


class Line:
    """One live line on standard error; without a terminal, a plain line now and then."""

    def __init__(self, every: float = 30.0) -> None:
        self._live = err.is_terminal
        self._every = every if not self._live else 0.1
        self._last = -math.inf
        self._open = False

    def update(self, text: str, *, keep: bool = False) -> None:
        """Show ``text`` in place of what was there; ``keep`` leaves it and begins a new line."""
        now = time.monotonic()
        if not keep and now - self._last < self._every:
            return
        self._last = now
        if not self._live:
            err.print(text, markup=False)
            return
        shown = text + "\n" if keep else text[: max(20, err.width - 1)]
        sys.stderr.write("\r\x1b[2K" + shown)
        sys.stderr.flush()
        self._open = not keep

    def close(self) -> None:
        """End the live line, so that what follows begins on a line of its own."""
        if self._open:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
            self._open = False
