"""``mmrec prepare``."""

from typing import TYPE_CHECKING, Annotated

import typer

from cli import console
from cli.options import JsonOption, WarehouseOption
from features.errors import UserError
from features.warehouse import DatasetInfo, Warehouse

if TYPE_CHECKING:
    from pipeline.datasets.prepare import PrepareOptions

NameOption = Annotated[
    str | None, typer.Option("--name", help="Name of the result; default: the dataset.")
]
CoreOption = Annotated[
    int | None,
    typer.Option("--k-core", help="Minimum interactions of users and items; 0: keep all."),
]
UsersOption = Annotated[
    int | None,
    typer.Option("--users", help="Users of a random sample, before the k-core; default: all."),
]
ColumnsOption = Annotated[
    str | None,
    typer.Option("--columns", help="Your names of columns: user=customer,item=sku,time=ts."),
]
TextColumnsOption = Annotated[
    str | None,
    typer.Option(
        "--text-columns", help="Columns that form the text of items: title,brand; else the usual."
    ),
]
DuplicateItemsOption = Annotated[
    str,
    typer.Option("--duplicate-items", help="Items with several rows: refuse, first or last row."),
]
DuplicateInteractionsOption = Annotated[
    str,
    typer.Option(
        "--duplicate-interactions", help="Rows equal in user, item and time: keep or drop."
    ),
]
HideItemsOption = Annotated[
    float | None,
    typer.Option("--hide-items", help="Share of items that are test targets only: 0.1."),
]
SplitOption = Annotated[
    str, typer.Option("--split", help="leave-one-out, or time: all users by two dates.")
]
ValidFromOption = Annotated[
    str | None, typer.Option("--valid-from", help="First date of validation, split by time.")
]
TestFromOption = Annotated[
    str | None, typer.Option("--test-from", help="First date of test, split by time.")
]
MinUserOption = Annotated[
    int | None,
    typer.Option("--min-user", help="Minimum interactions of users alone, in place of k-core."),
]
FormatOption = Annotated[
    str | None, typer.Option("--format", help="Importer of your data; see: mmrec datasets.")
]
FileOption = Annotated[
    list[str] | None,
    typer.Option("--file", help="ROLE=PATH of a raw file, relative to --raw; repeatable."),
]
ImagesOption = Annotated[
    str | None, typer.Option("--images", help="Folder of images; as --file images=PATH.")
]


def prepare(
    dataset: Annotated[str, typer.Option("--dataset", help="A known dataset, or a new name.")],
    raw: Annotated[
        str | None, typer.Option("--raw", help="Folder of the raw files, or s3://BUCKET/PREFIX.")
    ] = None,
    name: NameOption = None,
    k_core: CoreOption = None,
    format: FormatOption = None,
    file: FileOption = None,
    split: SplitOption = "leave-one-out",
    valid_from: ValidFromOption = None,
    test_from: TestFromOption = None,
    users: UsersOption = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of --users and --hide-items.")] = 0,
    hide_items: HideItemsOption = None,
    min_user: MinUserOption = None,
    columns: ColumnsOption = None,
    text_columns: TextColumnsOption = None,
    images: ImagesOption = None,
    unlisted: Annotated[
        str, typer.Option(help="Interactions with items that are not listed: refuse, keep or drop.")
    ] = "refuse",
    duplicate_items: DuplicateItemsOption = "refuse",
    duplicate_interactions: DuplicateInteractionsOption = "keep",
    ties: Annotated[
        str, typer.Option(help="Order of equal times of a user: file, id, id-desc or hash.")
    ] = "file",
    json: JsonOption = False,
    root: WarehouseOption = None,
) -> None:
    """Read raw files, apply the k-core, order by time, and write the canonical tables."""
    from pipeline.datasets.prepare import PrepareOptions

    warehouse = Warehouse(root)
    options = PrepareOptions(
        dataset=dataset,
        name=name,
        raw=raw,
        k_core=k_core,
        split=split,
        valid_from=valid_from,
        test_from=test_from,
        users=users,
        seed=seed,
        hide_items=hide_items,
        min_user=min_user,
        format=format,
        files=_files(file, images),
        columns=_columns(columns),
        text_columns=_names(text_columns),
        duplicate_items=duplicate_items,
        duplicate_interactions=duplicate_interactions,
        unlisted=unlisted,
        ties=ties,
    )
    info = run_prepare(warehouse, options)
    if json:
        console.emit_json(info.summary())
    else:
        show_prepared(info)


def _files(given: list[str] | None, images: str | None) -> dict[str, str]:
    """Return role to path of the files that are given by ``--file`` and ``--images``."""
    return dict(map(_role_and_path, given or [])) | ({"images": images} if images else {})


def _columns(given: str | None) -> dict[str, str]:
    """Return role to name of the columns that are given by ``--columns``."""
    columns = {}
    for pair in given.split(",") if given else []:
        role, _, name = (part.strip() for part in pair.partition("="))
        if not role or not name or role in columns:
            raise UserError(
                f"--columns {given!r} must look like ROLE=NAME,ROLE=NAME with each role once, such"
                " as user=customer,item=sku,time=ts"
            )
        columns[role] = name
    return columns


def _names(given: str | None) -> tuple[str, ...]:
    """Return the names of columns that are given by ``--text-columns``."""
    names = tuple(name.strip() for name in given.split(",")) if given is not None else ()
    if not all(names) or len(set(names)) < len(names):
        raise UserError(
            f"--text-columns {given!r} must be names of columns, each once, such as title,brand"
        )
    return names


def _role_and_path(text: str) -> tuple[str, str]:
    role, equals, path = text.partition("=")
    if not equals:
        raise UserError(f"--file {text!r} must look like ROLE=PATH, such as items=items.csv")
    return role, path


def run_prepare(warehouse: Warehouse, options: "PrepareOptions") -> DatasetInfo:
    """Prepare a dataset and print messages on standard error."""
    from pipeline.datasets.prepare import prepare_dataset

    return prepare_dataset(warehouse, options, notify=console.notify)


def show_prepared(info: DatasetInfo) -> None:
    """Print the size of a prepared dataset."""
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
