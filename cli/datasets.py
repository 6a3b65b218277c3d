"""``mmrec datasets``."""

from typing import Any

import typer

from cli import console
from cli.options import JsonOption, WarehouseOption
from features.registry import OWN
from features.warehouse import Warehouse


def datasets(json: JsonOption = False, root: WarehouseOption = None) -> None:
    """List the known datasets, their expected raw files, and the prepared tables."""
    from pipeline.datasets.importers.registry import IMPORTERS
    from pipeline.datasets.listing import list_datasets
    from pipeline.datasets.registry import DATASETS

    rows = list_datasets(Warehouse(root))
    unusable = {
        **{f"format {name}": reason for name, reason in IMPORTERS.broken.items()},
        **{f"dataset {name}": reason for name, reason in DATASETS.broken.items()},
        **{f"dataset {row['dataset']}": row["error"] for row in rows if row["error"]},
    }
    for entry, reason in unusable.items():
        console.notify(f"{entry} cannot be used: {reason}")
    if json:
        console.emit_json(rows)
    else:
        _print(rows)
    if any(row["damaged"] for row in rows):
        raise typer.Exit(1)


def _print(rows: list[dict[str, Any]]) -> None:
    """Print the table of the datasets, their raw files, and the formats of one's own data."""
    from pipeline.datasets.importers.registry import IMPORTERS

    console.table(
        ["dataset", "raw files", "prepared", "users", "items", "interactions", "k-core"],
        [
            [
                row["dataset"], "found" if row["raw_found"] else "-",
                "damaged" if row["damaged"] else row["prepared"],
                row["users"], row["items"], row["interactions"], row["k_core"],
            ]
            for row in rows
        ],
    )  # fmt: skip
    console.out.print("\nexpected raw files (another folder: --raw), and their source")
    for row in rows:
        files = "; ".join(
            f"{role}: {' or '.join(patterns)}" for role, patterns in row["expected"].items()
        )
        name = f"{row['dataset']}{_added_by(row['origin'])}"
        console.out.print(f"  {name} ({row['format']}): {row['raw']}")
        missing = "dataset.json is damaged; prepare it again" if row["damaged"] else "as prepared"
        console.out.print(f"    {files or missing}")
        console.out.print(f"    from {row['source']}")
    console.out.print("\nformats of your own data (--format)")
    for name, importer in IMPORTERS.items():
        added_by = _added_by(IMPORTERS.origin(name))
        console.out.print(f"  {name}{added_by}: {importer.summary}")


def _added_by(origin: str | None) -> str:
    return "" if origin in (None, OWN) else f" [{origin}]"
