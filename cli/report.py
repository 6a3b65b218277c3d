"""``mmrec report``: an HTML page about runs, their gallery, or an image of convergence curves."""

from contextlib import closing
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
    gallery: Annotated[
        bool,
        typer.Option(
            "--gallery",
            help="Write a page of images instead, gallery.html: lists of users, neighbours of items"
            " and a map of items, for at most four runs.",
        ),
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
    """Write a page about runs: curves, test metrics, differences, settings, features; or a gallery.

    The page is one HTML file that loads nothing from the network.
    """
    warehouse = Warehouse(root)
    if not runs:
        runs = [choose_run(warehouse, None).name]
    if gallery:
        _check_gallery(curves=curves is not None, with_map=with_map, metric=metric, seen=seen)
        _show_path(runs, write_gallery(warehouse, runs, out, label), json)
        return
    if curves is not None and (out is not None or with_map):
        option = "--map" if out is None else "--out"
        raise UserError(f"--curves draws only the image; leave {option} out, or give it alone")
    _show_path(runs, _write(warehouse, runs, label, (metric, seen), curves, out, with_map), json)


def _write(
    warehouse: Warehouse,
    runs: list[str],
    labels: list[str] | None,
    metric_and_seen: tuple[str | None, str | None],
    curves: Path | None,
    out: Path | None,
    with_map: bool,
) -> Path:
    """Write the page, or the image of the curves alone; return the path."""
    from features.atomic_files import write_text
    from trainer.analysis.curves import read_curves
    from trainer.analysis.figures import check_image_path, draw_curves, save_figure
    from trainer.runs.read import read_records

    if curves is not None:
        check_image_path(curves)
    metric, seen = metric_and_seen
    records = read_records(warehouse, runs)
    from trainer.analysis.report import build_report  # imports torch

    curve_data = read_curves(records, metric=metric, seen=seen, labels=labels)
    if curves is not None:
        save_figure(draw_curves(curve_data), curves)
        return curves
    path = out or records[0].folder / "report.html"
    maps = _maps(warehouse, runs, labels) if with_map else []
    write_text(path, build_report(warehouse, records, curve_data, maps))
    return path


def _show_path(runs: list[str], path: Path, json: bool) -> None:
    if json:
        console.emit_json({"runs": runs, "file": str(path)})
    else:
        console.out.print(str(path))


def _check_gallery(**options: object) -> None:
    """Raise UserError if an option of the other page is given."""
    for name, value in options.items():
        if value:
            option = {"with_map": "map"}.get(name, name)
            raise UserError(f"--gallery writes another page; leave --{option} out, or --gallery")


def write_gallery(
    warehouse: Warehouse, runs: list[str], out: Path | None, labels: list[str] | None
) -> Path:
    """Write the gallery of some runs, and show the current step on a live line.

    Args:
        warehouse: Warehouse with the runs.
        runs: Names of runs of one dataset.
        out: The file; by default ``gallery.html`` in the folder of the first run.
        labels: Labels of the runs; by default their names.

    Returns:
        The path of the page.
    """
    from features.atomic_files import write_text
    from features.dataset import load_items
    from pipeline.media.thumbnails import Thumbnails
    from trainer.analysis.gallery import GalleryOptions, collect_gallery
    from trainer.analysis.gallery_page import build_gallery

    with console.ProgressLine(interval=0.0) as line:
        gallery = collect_gallery(
            warehouse, runs, GalleryOptions(), labels=labels, on_stage=line.update
        )
        line.update("images of the gallery")
        items = load_items(warehouse, gallery.dataset, ["item_id", "text"])
        with closing(Thumbnails(warehouse, gallery.dataset)) as thumbnails:
            page = build_gallery(gallery, items, thumbnails.read)
    path = out or warehouse.choose_run(runs[0])[0] / "gallery.html"
    write_text(path, page)
    return path


def _maps(warehouse: Warehouse, runs: list[str], labels: list[str] | None) -> "list[RunMap]":
    from trainer.analysis.maps import MapOptions, map_runs

    with console.ProgressLine(interval=0.0) as line:
        return map_runs(warehouse, runs, MapOptions(), labels=labels, on_stage=line.update)
