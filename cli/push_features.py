"""``mmrec push-features``."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from typer import Option

from cli import console
from cli.options import DatasetOption, JsonOption, WarehouseOption
from features.warehouse import Warehouse

if TYPE_CHECKING:
    from features.table_copies import TableCopy

TablesOption = Annotated[
    list[str] | None,
    Option("--features", help="MODALITY=BACKBONE[:LEVEL]; repeatable; default: all that exist."),
]


def push_features(
    to: Annotated[str, Option("--to", help="Folder of the copies: s3://BUCKET/PREFIX.")],
    dataset: DatasetOption = None,
    features: TablesOption = None,
    json: JsonOption = False,
    root: WarehouseOption = None,
) -> None:
    """Copy finished feature tables to object storage; pull-features copies them back.

    A copy becomes complete with its last file, and an earlier copy stays complete until then. Run
    the command again after an interrupt: only what is missing is sent.
    """
    from features.object_storage import StorageFolder
    from features.store import FeatureStore
    from features.table_copies import choose_tables, push_table

    folder = StorageFolder(to)
    warehouse = Warehouse(root)
    name, _ = warehouse.choose_dataset(dataset)
    tables = choose_tables(FeatureStore(warehouse).tables(name), features or [], f"dataset {name}")
    info = warehouse.info(name)
    show_copies([push_table(table, info, folder) for table in tables], name, json=json)


def show_copies(copies: "list[TableCopy]", dataset: str, *, json: bool) -> None:
    """Print the tables that were copied."""
    if json:
        console.emit_json({"dataset": dataset, "tables": [asdict(copy) for copy in copies]})
        return
    console.table(
        ["features", "parts", "copied", "MB", "copy"],
        [
            [copy.table, copy.parts, copy.copied, f"{copy.bytes / 1e6:.1f}", copy.url]
            for copy in copies
        ],
    )
