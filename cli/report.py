"""``mmrec report``: a page about runs, and their convergence curves as a picture."""

from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli.options import JsonOption, WarehouseOption
from features.errors import UserError
from features.warehouse import Warehouse


def report(
    runs: Annotated[
        list[str] | None, typer.Argument(help="Runs, side by side; else the last one.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The page; else report.html in the first run's folder."),
    ] = None,
    curves: Annotated[
        Path | None,
        typer.Option("--curves", help="Draw only the curves: FILE.png, .svg or .pdf."),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", help="What a run is called; one for each run, in order."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option("--metric", help="Of the curves; else what the runs were stopped by."),
    ] = None,
    seen: Annotated[
        str | None, typer.Option("--seen", help="filtered or kept, of the curves.")
    ] = None,
    json: JsonOption = False,
    root: WarehouseOption = None,
) -> None:
    """Write a page about runs: curves by epoch and time, test table, settings, features.

    The page is one file that loads nothing from anywhere.
    """
    warehouse = Warehouse(root)
    if not runs:
        folder, why = warehouse.choose_run(None)
        console.notify(f"run: {folder.name} ({why})")
        runs = [folder.name]
    from trainer.analysis.curves import check_picture, draw, read_curves, save
    from trainer.runs.read import read_records

    if curves is not None:
        check_picture(curves)
        if out is not None:
            raise UserError("--curves draws only the picture; leave --out out, or give --out alone")
    records = read_records(warehouse, runs)
    found = read_curves(records, metric=metric, seen=seen, labels=label)
    if curves is not None:
        path = curves
        save(draw(found), path)
    else:
        from features.atomic_files import write_text
        from trainer.analysis.report import build_report

        path = out or records[0].folder / "report.html"
        write_text(path, build_report(warehouse, records, found))
    if json:
        console.emit_json({"runs": runs, "file": str(path)})
    else:
        console.out.print(str(path))
