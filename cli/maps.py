"""``mmrec map``: an image of the items and of the users' histories of a run, or of two."""

from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli.options import DeviceOption, JsonOption, WarehouseOption, choose_run
from features.warehouse import Warehouse


def draw_map(
    runs: Annotated[
        list[str] | None,
        typer.Argument(help="One run, or two for a map of both; default: the last one."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="FILE.png, .svg or .pdf; default: map.png in the first run's folder."
        ),
    ] = None,
    items: Annotated[int, typer.Option("--items", help="Items, a random sample.")] = 1500,
    users: Annotated[
        int,
        typer.Option("--users", help="Users, a random sample; more than 20 are one point each."),
    ] = 10,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Seed of the samples and of t-SNE.")
    ] = 0,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", help="Name of a run in the image; one for each run, in order."),
    ] = None,
    device: DeviceOption = None,
    json: JsonOption = False,
    root: WarehouseOption = None,
) -> None:
    """Draw the items and the users' histories of a run as a map (t-SNE).

    Popular and cold items have different colours. Two runs of one dataset show the same items and
    users.
    """
    warehouse = Warehouse(root)
    if not runs:
        runs = [choose_run(warehouse, None).name]
    from trainer.analysis.figures import check_image_path, save_figure
    from trainer.analysis.maps import MapOptions, draw_maps, map_runs

    options = MapOptions(items=items, users=users, seed=seed)
    path = out or warehouse.choose_run(runs[0])[0] / "map.png"
    check_image_path(path)
    with console.ProgressLine(interval=0.0) as line:
        maps = map_runs(warehouse, runs, options, labels=label, device=device, on_stage=line.update)
    save_figure(draw_maps(maps), path)
    if json:
        console.emit_json({"file": str(path), "maps": [run_map.counts() for run_map in maps]})
    else:
        console.out.print(str(path))
