"""``mmrec import-features``."""

from dataclasses import asdict
from typing import Annotated

import typer

from cli import console
from cli.options import DatasetOption, JsonOption, WarehouseOption
from features.errors import UserError
from features.warehouse import Warehouse


def import_features(
    dataset: DatasetOption = None,
    image: Annotated[str | None, typer.Option("--image", help="File of image vectors.")] = None,
    text: Annotated[str | None, typer.Option("--text", help="File of text vectors.")] = None,
    video: Annotated[str | None, typer.Option("--video", help="File of video vectors.")] = None,
    ids: Annotated[
        str | None, typer.Option("--ids", help="File of the item id of each row, one a line.")
    ] = None,
    prepared_order: Annotated[
        bool, typer.Option("--prepared-order", help="Rows are the items in the prepared order.")
    ] = False,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the table; default: the file's.")
    ] = None,
    json: JsonOption = False,
    root: WarehouseOption = None,
) -> None:
    """Import ready-made vectors (.npy, .npz, .parquet, .safetensors, .pt, .itememb, a folder)."""
    given = {"image": image, "text": text, "video": video}
    files = {modality: file for modality, file in given.items() if file is not None}
    if not files:
        raise UserError("no file of vectors; give --image FILE, --text FILE or --video FILE")
    from pipeline.extraction import import_features as imports

    warehouse = Warehouse(root)
    chosen, _ = warehouse.choose_dataset(dataset)
    rows = [
        asdict(
            imports.import_features(
                warehouse, chosen, modality, file,
                ids=ids, prepared_order=prepared_order, name=name,
            )
        )
        for modality, file in files.items()
    ]  # fmt: skip
    for row, file in zip(rows, files.values(), strict=True):
        if row["failed"]:
            none_left = " and no vector is left" if not row["rows"] else ""
            console.notify(
                f"{row['failed']} vectors of {file} are not imported{none_left}: {row['reason']};"
                " correct the file, or extract the features; the view failures lists the items"
            )
    if json:
        console.emit_json({"dataset": chosen, "tables": rows})
    else:
        columns = [name for name in rows[0] if name != "reason"]
        console.table(columns, [[row[column] for column in columns] for row in rows])
