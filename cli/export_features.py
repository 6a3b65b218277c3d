"""``mmrec export-features``."""

from pathlib import Path
from typing import Annotated

from typer import Option

from cli import console
from cli.options import DatasetOption, JsonOption, WarehouseOption
from features.errors import UserError
from features.warehouse import Warehouse


def export_features(
    npy: Annotated[Path, Option("--npy", help="File of the vectors, one row an item.")],
    ids: Annotated[Path, Option("--ids", help="File of the item id of each row, one a line.")],
    dataset: DatasetOption = None,
    features: Annotated[
        str | None,
        Option("--features", help="Feature table MODALITY[=BACKBONE]; default: the only one."),
    ] = None,
    json: JsonOption = False,
    root: WarehouseOption = None,
) -> None:
    """Write the pooled vectors of a feature table as a NumPy array; import-features reads both."""
    from features.store import FeatureStore, export_vectors

    warehouse = Warehouse(root)
    name, _ = warehouse.choose_dataset(dataset)
    store = FeatureStore(warehouse)
    modality, _, backbone = (features or "").partition("=")
    if not features:
        pooled = [table for table in store.tables(name) if table.level == "pooled"]
        if len(pooled) != 1:
            listed = ", ".join(table.label for table in pooled) or "none; run mmrec extract"
            raise UserError(f"dataset {name!r} has these pooled tables: {listed}; give --features")
        modality, backbone = pooled[0].modality, pooled[0].backbone
    shape = export_vectors(store, name, modality, backbone or None, npy=npy, ids=ids)
    if json:
        console.emit_json({"dataset": name, "npy": str(npy), "ids": str(ids), "shape": shape})
    else:
        console.notify(f"{shape[0]:,} x {shape[1]} vectors: {npy}; their item ids: {ids}")
