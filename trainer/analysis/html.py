"""The pieces of an HTML page that loads nothing: its frame, its tables, its notes."""

import importlib.metadata
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2rem auto;
  max-width: 1000px; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.note, figcaption, footer { color: #555; font-size: .9rem; }
figure { margin: 1rem 0; } svg { width: 100%; height: auto; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .25rem .7rem; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; }
thead th { border-bottom: 2px solid #999; } tbody tr { border-bottom: 1px solid #e3e3e3; }
small { color: #666; }
details { margin: .8rem 0; } summary { cursor: pointer; }
""".strip()


class Markup(str):
    """What is HTML already: a figure with what stands beside it."""

    __slots__ = ()


def document(title: str, sections: Iterable[str]) -> str:
    """The whole page; its policy forbids the reader's program to fetch anything."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    version = importlib.metadata.version("mmrec")
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            f"<title>{escape(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>",
            *sections,
            f"<footer>made by mmrec {escape(version)}</footer>\n</body>\n</html>\n",
        ]
    )


def note(text: str) -> str:
    """A paragraph in small print."""
    return f'<p class="note">{escape(text)}</p>'


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]], *, caption: str = "") -> str:
    """A table; figures stand on the right, the first column names the rows."""
    listed = [list(row) for row in rows]
    numeric = [
        bool(listed) and all(isinstance(row[i], int | float | Markup | None) for row in listed)
        for i in range(len(listed[0]) if listed else 0)
    ]
    found = ['<div class="wide"><table>']
    if caption:
        found.append(f"<caption>{escape(caption)}</caption>")
    if heads:
        kinds = numeric or [False] * len(heads)
        cells = "".join(
            f"<th{' class=n' if right else ''}>{escape(head).replace(chr(10), '<br>')}</th>"
            for head, right in zip(heads, kinds, strict=True)
        )
        found.append(f"<thead><tr>{cells}</tr></thead>")
    found.append("<tbody>")
    for row in listed:
        cells = "".join(
            f"<td{' class=n' if right else ''}>{_cell(value)}</td>"
            for value, right in zip(row, numeric, strict=True)
        )
        found.append(f"<tr>{cells}</tr>")
    found.append("</tbody></table></div>")
    return "\n".join(found)


def _cell(value: Any) -> str:
    if isinstance(value, Markup):
        return value
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if np.isfinite(value) else "-"
    return f"{value:,}" if isinstance(value, int) else escape(str(value))
