"""``mmrec datasets`` and ``mmrec prepare``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import console
from cli.options import JsonOption, WarehouseOption
from features.errors import UserError
from features.warehouse import DatasetInfo, Warehouse

if TYPE_CHECKING:
    pass


def datasets(json: JsonOption = False, root: WarehouseOption = None) -> None:
    """List the known datasets: where their raw files are expected, and what is prepared."""
    from pipeline.datasets.prepare import describe

    rows = describe(Warehouse(root))
    if json:
        console.emit_json(rows)
        return
    console.table(
        ["dataset", "raw files", "prepared", "users", "items", "interactions", "k-core"],
        [
            [
                row["dataset"], "there" if row["raw_found"] else "-",
                "damaged" if row["damaged"] else row["prepared"],
                row["users"], row["items"], row["interactions"], row["k_core"],
            ]
            for row in rows
        ],
    )  # fmt: skip
    console.out.print(
        "\nwhere the raw files are looked for (another folder: --raw), and their source"
    )
    for row in rows:
        files = "; ".join(map(_role, row["expected"].items()))
        console.out.print(f"  {row['dataset']} ({row['format']}): {row['raw']}", markup=False)
        console.out.print(f"    {files or 'as prepared'}", markup=False)
        console.out.print(f"    from {row['source']}", markup=False)


def _role(entry: tuple[str, list[str]]) -> str:
    role, names = entry
    return f"{role}: {' or '.join(names)}"


def prepare(
    dataset: Annotated[str, typer.Option("--dataset", help="A known dataset, or a new name.")],
    raw: Annotated[Path | None, typer.Option("--raw", help="Folder of the raw files.")] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="What it is called here, to keep several preparations."),
    ] = None,
    k_core: Annotated[
        int | None,
        typer.Option("--k-core", help="Users and items keep at least this many; 0: all."),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option("--format", help="Importer of a dataset of your own: see the README."),
    ] = None,
    file: Annotated[
        list[str] | None,
        typer.Option("--file", help="ROLE=PATH of a raw file, relative to --raw; repeatable."),
    ] = None,
    unlisted: Annotated[
        str,
        typer.Option(help="Interactions with items that are not listed: refuse, keep or drop."),
    ] = "refuse",
    json: JsonOption = False,
    root: WarehouseOption = None,
) -> None:
    """Read raw files, apply the k-core, order by time, and write the canonical tables."""
    warehouse = Warehouse(root)
    info = run_prepare(warehouse, dataset, raw, k_core, format, file, unlisted, name)
    if json:
        console.emit_json(info.summary())
    else:
        show_prepared(info)


def run_prepare(
    warehouse: Warehouse,
    dataset: str,
    raw: Path | None = None,
    k_core: int | None = None,
    format: str | None = None,
    file: list[str] | None = None,
    unlisted: str = "refuse",
    name: str | None = None,
) -> DatasetInfo:
    """Prepare a dataset; files are ``role=path``."""
    from pipeline.datasets.prepare import prepare as run

    files = {}
    for entry in file or []:
        role, equals, path = entry.partition("=")
        if not equals:
            raise UserError(f"--file {entry!r} must look like ROLE=PATH, such as items=items.csv")
        files[role] = path
    return run(
        warehouse,
        dataset,
        to=name,
        raw=raw,
        k_core=k_core,
        format=format,
        files=files,
        unlisted=unlisted,
        notify=console.notify,
    )


def show_prepared(info: DatasetInfo) -> None:
    """Print what a prepared dataset holds."""
    figures = info.summary()
    console.table(
        ["dataset", "users", "items", "interactions", "average length", "sparsity", "k-core"],
        [
            [
                info.name, info.users, info.items, info.interactions,
                f"{figures['average_length']:.2f}", f"{figures['sparsity']:.4%}", info.k_core,
            ]
        ],
    )  # fmt: skip
