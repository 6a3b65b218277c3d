"""``mmrec doctor``: what is there, and what is not."""

import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import console
from cli.options import JsonOption, WarehouseOption

if TYPE_CHECKING:
    from pipeline.doctor import Row

_NAME = 14  # columns; long texts go on in lines of their own, under the first
_NARROWEST = 24


def doctor(
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Import also the libraries that take seconds.")
    ] = False,
    json: JsonOption = False,
    root: WarehouseOption = None,
) -> None:
    """Tell what is there: libraries, devices, decoders, weights, the warehouse."""
    from pipeline.doctor import examine

    rows = examine(root, thorough=thorough)
    if json:
        console.emit_json([asdict(row) for row in rows])
        return
    for part in dict.fromkeys(row.part for row in rows):
        of_part = [row for row in rows if row.part == part]
        console.table(
            [f"{part:<{_NAME}}", "", ""], [line for row in of_part for line in _lines(row)]
        )


def _lines(row: "Row") -> list[list[Any]]:
    """One row of a table for each line that the text takes."""
    width = max(_NARROWEST, min(console.out.width, 80) - _NAME - len("  yes  "))
    first, *more = textwrap.wrap(row.says, width, break_on_hyphens=False) or [""]
    return [[row.name, row.there, first], *(["", "", line] for line in more)]
