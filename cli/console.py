"""Print results on standard output, messages and progress on standard error."""

import json
import math
import re
import sys
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.live import Live

_MAX_CELL = 80  # characters of one cell; --json and --csv print the whole value
_MIN_COLUMN = 12  # characters that a text column keeps on a narrow terminal
_UNBOUNDED = 10_000  # width of a file or a pipe, where no line is wrapped or cut
_BAR_WIDTH = 16
_REFRESH_SECONDS = 0.1  # between two states of a live line
# A dash for no value; a number with its interval or spread, the best one marked; a vector.
_NUMBER = re.compile(r"-|\*?[-+]?[\d,.]+(e[-+]?\d+)?%?( \[.*\]| ?(±|\+-)[\d.]+)?|\[.*\]")
# Control characters, invisible formats (such as changes of direction), surrogates, separators.
_UNSAFE_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")
_JOINERS = "\u200c\u200d"  # formats that words of some languages and emoji need


def printable(text: str, *, keep: str = "") -> str:
    r"""Return a text with escapes in place of characters that a terminal obeys or does not show.

    Ids, titles, file names and messages of libraries may contain such characters. An escape
    sequence could colour or clear the screen, and a change of direction could reorder a line.

    Args:
        text: Any text.
        keep: Characters that stay as they are.

    Examples:
        >>> printable("red: \x1b[31m")
        'red: \\x1b[31m'
    """
    if text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode() if _is_unsafe(char) and char not in keep else char
        for char in text
    )


def _is_unsafe(char: str) -> bool:
    return unicodedata.category(char) in _UNSAFE_CATEGORIES and char not in _JOINERS


class SafeConsole(Console):
    """A console that prints every string as it is, but for characters that are not printable."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Convert a string to a text without unsafe characters; line breaks stay."""
        return super().render_str(printable(text, keep="\n"), **options)


def _console(*, stderr: bool) -> Console:
    """Return a console that prints text as it is, without wrapping: commands can be copied."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _UNBOUNDED
    return SafeConsole(
        stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True, width=width
    )


out = _console(stderr=False)
err = _console(stderr=True)


def notify(message: str) -> None:
    """Print a message for the user on standard error, in one line."""
    err.print(printable(message))


def print_text(text: str, *, indent: int = 0) -> None:
    """Print a paragraph on standard output; a terminal wraps it between words."""
    out.print(Padding(text, (0, 0, 0, indent), expand=False), soft_wrap=False)


def emit_json(document: Any) -> None:
    """Print a document as one line of JSON; NaN and infinities become null.

    Strings keep all their characters: a program reads them.
    """
    text = json.dumps(_jsonable(document), ensure_ascii=not _has_unicode(out), default=str)
    sys.stdout.write(text + "\n")


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Decimal):  # DuckDB returns sums of integers as decimals
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, Mapping):
        return {str(key): _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(entry) for entry in value]
    return value


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    title: str | None = None,
    wrap: bool = True,
    transpose: bool = False,
) -> None:
    """Print a table.

    Columns of numbers are aligned on the right and are never cut. On a terminal that is too
    narrow, columns of text become narrower.

    Args:
        columns: Headings; a line break divides a heading into two lines.
        rows: One value a column. ``rich.text.Text`` keeps its style, other values are formatted.
        title: Printed above the table.
        wrap: Continue long texts on the next line; otherwise cut them.
        transpose: Print the columns as rows where the terminal is too narrow for all of them.
    """
    columns = [printable(column, keep="\n") for column in columns]
    cells = [[_cell(value) for value in row] for row in rows]
    if transpose and table_width(columns, cells) > out.width:
        headings, *cells = [list(line) for line in zip(map(Text, columns), *cells, strict=True)]
        columns = [heading.plain for heading in headings]
    if title:
        out.print(title, style="bold")
    with out.capture() as capture:
        out.print(_rich_table(columns, cells, wrap=wrap))
    for line in capture.get().splitlines():
        out.file.write(line.rstrip() + "\n")  # rich fills the last column with spaces


Column = tuple[str, Sequence[Any]]
"""Heading and cells of a column."""


def stacked_tables(
    labels: Sequence[Column], groups: Sequence[Sequence[Column]], *, title: str | None = None
) -> None:
    """Print a table whose columns may need more room than the terminal has.

    Groups that do not fit beside each other are printed in several tables, one below the other.

    Args:
        labels: The columns that name the rows; each table repeats them.
        groups: The other columns; the columns of one group stay together.
        title: Printed above the first table.
    """
    parts: list[list[Column]] = []
    for group in groups:
        if not parts or _width_of([*labels, *parts[-1], *group]) > out.width:
            parts.append([])
        parts[-1] += group
    for number, part in enumerate(parts):
        if number:
            out.print()
        table(*_headings_and_rows([*labels, *part]), title=None if number else title)


def _width_of(columns: Sequence[Column]) -> int:
    return table_width(*_headings_and_rows(columns))


def _headings_and_rows(columns: Sequence[Column]) -> tuple[list[str], list[tuple[Any, ...]]]:
    headings = [heading for heading, _ in columns]
    return headings, list(zip(*(cells for _, cells in columns), strict=True))


def table_width(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> int:
    """Return the width in characters of a table that is neither wrapped nor cut."""
    cells = [[_cell(value) for value in row] for row in rows]
    options = out.options.update(width=_UNBOUNDED)
    return Measurement.get(out, options, _rich_table(columns, cells, wrap=True)).maximum


def _rich_table(columns: Sequence[str], rows: Sequence[Sequence[Text]], *, wrap: bool) -> Table:
    built = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, column in enumerate(columns):
        texts = [row[index] for row in rows]
        width = max(text.cell_len for text in (*map(Text, column.split("\n")), *texts))
        is_numeric = bool(texts) and all(_NUMBER.fullmatch(text.plain) for text in texts)
        built.add_column(
            Text(column),
            justify="right" if is_numeric else "left",
            no_wrap=is_numeric,
            min_width=width if is_numeric else min(width, _MIN_COLUMN),
            overflow="fold",
        )
    for row in rows:
        for text in row:
            if not wrap:
                text.no_wrap = True
                text.overflow = "ellipsis" if _has_unicode(out) else "crop"
        built.add_row(*row)
    return built


def _cell(value: Any) -> Text:
    if isinstance(value, Text):
        safe = printable(value.plain, keep="\n")
        return value if safe == value.plain else Text(safe, value.style)
    return Text(format_value(value))


def format_value(value: Any) -> str:
    """Return a value as tables print it, at most 80 characters long."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Decimal):
        value = _jsonable(value)
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 1000 else f"{value:,.1f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple) and len(value) > 4:
        head = ", ".join(format_value(entry) for entry in value[:3])
        return f"[{head}, ... {len(value)}]"
    text = printable(" ".join(str(value).split()))
    return text if len(text) <= _MAX_CELL else text[: _MAX_CELL - 3] + "..."


def format_duration(seconds: float) -> str:
    """Return a duration in the largest units that matter: ``8s``, ``3m20s``, ``2h05m``."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def format_spread(deviation: float) -> str:
    """Return a standard deviation with its sign: ``±.0123``, or ``+-.0123`` without Unicode."""
    return ("±" if _has_unicode(out) else "+-") + f"{deviation:.4f}".replace("0.", ".", 1)


def format_interval(low: float, high: float) -> str:
    """Return a confidence interval without leading zeros: ``[.0123, .0456]``."""
    return "[" + ", ".join(f"{bound:.4f}".replace("0.", ".", 1) for bound in (low, high)) + "]"


def _has_unicode(console: Console) -> bool:
    return console.encoding.startswith("utf")


class ProgressLine:
    """Progress of one task on standard error.

    A terminal shows one line that is replaced at each update. A file or a pipe receives a plain
    line at most once in ``interval`` seconds.

    Args:
        interval: Seconds between two lines where standard error is not a terminal.

    Examples:
        >>> with ProgressLine() as progress:
        ...     progress.update("encoding items", share=0.5)
    """

    def __init__(self, interval: float = 30.0) -> None:
        self._is_live = err.is_terminal and not err.is_dumb_terminal
        self._interval = _REFRESH_SECONDS if self._is_live else interval
        self._shown_at = -math.inf
        self._live: Live | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def update(self, text: str, *, share: float | None = None, keep: bool = False) -> None:
        """Replace the line.

        Args:
            text: The new line.
            share: Part of the work that is done, from 0 to 1; a terminal shows it as a bar.
            keep: Print the line for good, whenever the last one was printed.
        """
        now = time.monotonic()
        if not keep and now - self._shown_at < self._interval:
            return
        self._shown_at = now
        if keep or not self._is_live:
            self.close()
            err.print(printable(text), soft_wrap=False)
            return
        if self._live is None:
            from rich.live import Live

            self._live = Live(
                console=err, auto_refresh=False, transient=True, redirect_stdout=False
            )
            self._live.start()
        self._live.update(_with_bar(text, share), refresh=True)

    def close(self) -> None:
        """Remove the line from the terminal."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def _with_bar(text: str, share: float | None) -> RenderableType:
    if share is None:
        return Text(printable(text))
    from rich.progress_bar import ProgressBar

    line = Table.grid(padding=(0, 1, 0, 0))
    line.add_row(ProgressBar(total=1.0, completed=share, width=_BAR_WIDTH), Text(printable(text)))
    return line
