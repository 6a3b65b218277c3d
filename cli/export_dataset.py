"""``mmrec export-dataset``."""

from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli.options import DatasetOption, JsonOption, WarehouseOption
from features.warehouse import Warehouse


def export_dataset(
    out: Annotated[Path, typer.Option("--out", help="Folder of the files, which may exist.")],
    dataset: DatasetOption = None,
    json: JsonOption = False,
    root: WarehouseOption = None,
) -> None:
    """Write a prepared dataset as RecBole's atomic files (.inter and .item)."""
    from pipeline.datasets.recbole_export import export_recbole

    warehouse = Warehouse(root)
    name, _ = warehouse.choose_dataset(dataset)
    paths = export_recbole(warehouse, name, out)
    if json:
        console.emit_json({"dataset": name, "files": [str(path) for path in paths]})
    else:
        console.table(["file"], [[str(path)] for path in paths])
