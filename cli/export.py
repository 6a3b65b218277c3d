"""``mmrec export``: a run as files for a server without mmrec."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli.options import JsonOption, RunArgument, TrainedRunOption, WarehouseOption, choose_run
from features.warehouse import Warehouse


def export(
    out: Annotated[Path, typer.Option("--out", help="Folder of the files, which may exist.")],
    name: RunArgument = None,
    run: TrainedRunOption = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Another dataset; default: that of the run, as it is now."),
    ] = None,
    json: JsonOption = False,
    root: WarehouseOption = None,
) -> None:
    """Write a run as ONNX encoders, item vectors and a FAISS index.

    The catalogue is that of the dataset as it is prepared now. README.md in the folder has a
    program that recommends from the files; mmrec recommend --export DIR reads them as well.
    """
    warehouse = Warehouse(root)
    folder = choose_run(warehouse, name, run)
    from trainer.runs.export import export_run, require_packages
    from trainer.runs.later import open_current

    require_packages()
    opened = open_current(warehouse, folder, dataset, device="cpu")
    for text in opened.catalogue_lines():
        console.notify(text)
    report = export_run(warehouse, opened, out)
    if json:
        console.emit_json(asdict(report))
        return
    console.table(["file"], [[str(path)] for path in sorted(out.iterdir()) if path.is_file()])
    console.notify(
        f"{report.items:,} items, opset {report.opset}; onnxruntime differs from the run by at most"
        f" {report.difference:.1e}"
    )
