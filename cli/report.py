"""``mmrec report``: an HTML page about runs, or an image of their convergence curves."""

from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli.options import JsonOption, WarehouseOption, choose_run
from features.errors import UserError
from features.warehouse import Warehouse


def report(
    runs: Annotated[
        list[str] | None, typer.Argument(help="Runs to show together; default: the last one.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="HTML file; default: report.html in the first run's folder."),
    ] = None,
    curves: Annotated[
        Path | None,
        typer.Option("--curves", help="Draw only the curves into FILE.png, .svg or .pdf."),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", help="Name of a run on the page; one for each run, in order."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option("--metric", help="Metric of the curves; default: that of early stopping."),
    ] = None,
    seen: Annotated[
        str | None,
        typer.Option("--seen", help="Ranking of the curves: seen items filtered or kept."),
    ] = None,
    json: JsonOption = False,
    root: WarehouseOption = None,
) -> None:
    """Write a page about runs: curves, test metrics, differences, settings, features.

    The page is one HTML file that loads nothing from the network.
    """
    warehouse = Warehouse(root)
    if not runs:
        runs = [choose_run(warehouse, None).name]
    from trainer.analysis.curves import read_curves
    from trainer.analysis.figures import check_image_path, draw_curves, save_figure
    from trainer.runs.read import read_records

    if curves is not None:
        check_image_path(curves)
        if out is not None:
            raise UserError("--curves draws only the image; leave --out out, or give --out alone")
    records = read_records(warehouse, runs)
    curve_data = read_curves(records, metric=metric, seen=seen, labels=label)
    if curves is not None:
        path = curves
        save_figure(draw_curves(curve_data), path)
    else:
        from features.atomic_files import write_text
        from trainer.analysis.report import build_report

        path = out or records[0].folder / "report.html"
        write_text(path, build_report(warehouse, records, curve_data))
    if json:
        console.emit_json({"runs": runs, "file": str(path)})
    else:
        console.out.print(str(path))
