"""``mmrec pull-features``."""

from typing import Annotated

from typer import Option

from cli.options import DatasetOption, JsonOption, WarehouseOption
from cli.push_features import TablesOption, show_copies
from features.warehouse import Warehouse


def pull_features(
    source: Annotated[str, Option("--from", help="Folder of the copies: s3://BUCKET/PREFIX.")],
    dataset: DatasetOption = None,
    features: TablesOption = None,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace a table that holds other vectors.")
    ] = False,
    json: JsonOption = False,
    root: WarehouseOption = None,
) -> None:
    """Copy finished feature tables from object storage into the warehouse.

    The dataset must be prepared as it was for the copy. Every byte is checked before a table
    changes. Run the command again after an interrupt: only what is missing is fetched.
    """
    from features.object_storage import StorageFolder
    from features.store import FeatureStore
    from features.table_copies import choose_tables, pull_table, stored_tables

    folder = StorageFolder(source)
    warehouse = Warehouse(root)
    name, _ = warehouse.choose_dataset(dataset)
    stored = stored_tables(FeatureStore(warehouse), name, folder)
    remedy = "correct the URL, or run mmrec push-features where the tables are"
    tables = choose_tables(stored, features or [], f"{folder.url}/{name}", remedy)
    info = warehouse.info(name)
    copies = [pull_table(table, info, folder, overwrite=overwrite) for table in tables]
    show_copies(copies, name, json=json)
