"""Options that several commands share."""

import re
from pathlib import Path
from typing import Annotated

import typer

from cli import console
from features.errors import UserError
from features.warehouse import Warehouse

WarehouseOption = Annotated[
    Path | None,
    typer.Option(
        "--warehouse",
        help="Data folder; default: $MMREC_WAREHOUSE, else ./warehouse.",
        show_default=False,
    ),
]
DatasetOption = Annotated[
    str | None,
    typer.Option("--dataset", help="Dataset; default: the last one of mmrec extract."),
]
RunArgument = Annotated[
    str | None, typer.Argument(metavar="RUN", help="Name of a run; default: the last one.")
]
TrainedRunOption = Annotated[str | None, typer.Option("--run", help="The same as RUN.")]


def _check_index(name: str) -> str:
    from retrieval.index_options import IndexNameError
    from retrieval.registry import parse_index

    try:
        parse_index(name)
    except IndexNameError as error:
        raise UserError(str(error)) from None
    return name


IndexOption = Annotated[
    str,
    typer.Option(
        "--index",
        callback=_check_index,
        help="Search index. Exact: faiss (takes the faster way), torch, faiss:flat, faiss:gpu."
        " Approximate, each with parameters: faiss:ivf,nlist=4096,nprobe=32, faiss:ivfpq,M=16,"
        "nbits=8,k_factor=10, faiss:hnsw,M=32,efConstruction=80,efSearch=64.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on standard output.")
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="auto, cpu, cuda or cuda:N; default: the device of the run."),
]


_SIZE = re.compile(
    r"(?P<number>\d{1,12}(\.\d+)?) ?(?P<unit>[KMGT])(?P<binary>i?)B?", re.ASCII | re.IGNORECASE
)


def parse_size(text: str) -> int:
    """Return a size in bytes.

    Raises:
        UserError: The text is no size, or the size is less than one byte.

    Examples:
        >>> parse_size("8GB"), parse_size("512MiB"), parse_size("1.5g")
        (8000000000, 536870912, 1500000000)
    """
    match = _SIZE.fullmatch(text.strip())
    size = 0
    if match is not None:
        base = 1024 if match["binary"] else 1000
        power = 1 + "KMGT".index(match["unit"].upper())
        size = int(float(match["number"]) * base**power)
    if not size:
        raise UserError(f"--memory {text!r} is no size; give a number and a unit, such as 8GB")
    return size


def choose_run(warehouse: Warehouse, name: str | None, option: str | None = None) -> Path:
    """Return the folder of the named run, else of the last run, and tell the user which it is.

    Args:
        warehouse: Holds the runs.
        name: The argument RUN.
        option: The value of ``--run``, which names a run as well.

    Raises:
        UserError: There is no such run, or two runs are named.
    """
    if None not in (name, option) and name != option:
        raise UserError(f"two runs are named, {name!r} and --run {option}; name one")
    folder, reason = warehouse.choose_run(name or option)
    if reason != "given":
        console.notify(f"run: {folder.name} ({reason})")
    return folder
