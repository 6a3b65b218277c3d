"""``mmrec report``: an HTML page about runs, or an image of their convergence curves."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import console
from cli.options import JsonOption, WarehouseOption, choose_run
from features.errors import UserError
from features.warehouse import Warehouse

if TYPE_CHECKING:
    from trainer.analysis.maps import RunMap

OptionalStr = str | None


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
    with_map: Annotated[
        bool, typer.Option("--map", help="Add the image of mmrec map, for at most two runs.")
    ] = False,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", help="Name of a run on the page; one for each run, in order."),
    ] = None,
    metric: Annotated[
        OptionalStr, typer.Option(help="Metric of the curves; default: that of early stopping.")
    ] = None,
    seen: Annotated[
        OptionalStr, typer.Option(help="Ranking of the curves: seen items filtered or kept.")
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
        if out is not None or with_map:
            option = "--map" if out is None else "--out"
            raise UserError(f"--curves draws only the image; leave {option} out, or give it alone")
    records = read_records(warehouse, runs)
    curve_data = read_curves(records, metric=metric, seen=seen, labels=label)
    if curves is not None:
        path = curves
        save_figure(draw_curves(curve_data), path)
    else:
        from features.atomic_files import write_text
        from trainer.analysis.report import build_report

        path = out or records[0].folder / "report.html"
        maps = _maps(warehouse, runs, label) if with_map else []
        write_text(path, build_report(warehouse, records, curve_data, maps))
    if json:
        console.emit_json({"runs": runs, "file": str(path)})
    else:
        console.out.print(str(path))


def _maps(warehouse: Warehouse, runs: list[str], labels: list[str] | None) -> "list[RunMap]":
    from trainer.analysis.maps import MapOptions, map_runs

    with console.ProgressLine(interval=0.0) as line:
        return map_runs(warehouse, runs, MapOptions(), labels=labels, on_stage=line.update)
