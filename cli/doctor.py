"""``mmrec doctor``."""

import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import console
from cli.options import JsonOption, WarehouseOption

if TYPE_CHECKING:
    from pipeline.doctor import Row

_NAME_WIDTH = 14
_MIN_DETAIL_WIDTH = 24


def doctor(
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Import the libraries that take seconds too.")
    ] = False,
    json: JsonOption = False,
    root: WarehouseOption = None,
) -> None:
    """Examine the installation: libraries, devices, decoders, weights, the warehouse."""
    from pipeline.doctor import examine

    rows = examine(root, thorough=thorough)
    if json:
        console.emit_json([asdict(row) for row in rows])
        return
    for part in dict.fromkeys(row.part for row in rows):
        part_rows = [row for row in rows if row.part == part]
        console.table(
            [f"{part:<{_NAME_WIDTH}}", "", ""], [line for row in part_rows for line in _lines(row)]
        )


def _lines(row: "Row") -> list[list[Any]]:
    """Return one line of the table for each line of the detail."""
    width = max(_MIN_DETAIL_WIDTH, min(console.out.width, 80) - _NAME_WIDTH - len("  yes  "))
    first, *others = textwrap.wrap(row.detail, width, break_on_hyphens=False) or [""]
    return [[row.name, row.available, first], *(["", "", line] for line in others)]
