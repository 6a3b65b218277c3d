"""``mmrec compare``: runs side by side, with what the users drawn can say of the difference."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from cli import console
from cli.options import JsonOption, WarehouseOption
from features.warehouse import Warehouse

if TYPE_CHECKING:
    from retrieval.significance import PairedTest
    from trainer.analysis.compare import Comparison

_SEEN = {"filtered": "out of", "kept": "left in"}


def compare(
    runs: Annotated[list[str], typer.Argument(help="Evaluated runs; the first is the reference.")],
    split: Annotated[str, typer.Option("--split", help="test or validation.")] = "test",
    targets: Annotated[
        str, typer.Option("--targets", help="all, or cold: fewer than 10 training interactions.")
    ] = "all",
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", help="Such as NDCG@20; repeatable. Else @10, @50 and MRR."),
    ] = None,
    by: Annotated[
        str,
        typer.Option("--by", help="Runs as one: run (none), model, settings (all but the seed)."),
    ] = "run",
    json: JsonOption = False,
    root: WarehouseOption = None,
) -> None:
    """Compare runs on the same users: the difference, its interval, and a paired test."""
    warehouse = Warehouse(root)
    from trainer.analysis.compare import SHOWN
    from trainer.analysis.compare import compare as go

    line = console.ProgressLine()
    try:
        found = go(
            warehouse,
            runs,
            split=split,
            targets=targets,
            metrics=metric or SHOWN,
            by=by,
            on_stage=line.update,
        )
    finally:
        line.close()
    if json:
        console.emit_json(asdict(found))
    else:
        show_compared(found)


def show_compared(found: "Comparison") -> None:
    """Print a table for each ranking, the reference first in each group of lines."""
    from trainer.analysis.compare import SEEN, SIGNS

    reference, *_ = found.systems
    cold = "" if found.targets == "all" else f", {found.targets} targets only"
    console.out.print(
        f"{found.dataset}, {found.split}{cold}: {found.users:,} users;"
        f" difference: to {reference.label}"
    )
    for system in found.systems:
        if len(system.runs) > 1:
            console.out.print(f"{system.label}: {', '.join(system.runs)}")
    for seen in SEEN:
        console.out.print()
        console.table(
            ["metric", "run", "value", "difference", "p"],
            [
                [
                    line.metric if line.system == reference.label else "",
                    line.system,
                    f"{line.value:.4f}" + ("" if line.spread is None else f" ±{line.spread:.4f}"),
                    None if line.test is None else _difference(line.test),
                    None if line.test is None else f"{line.test.p_value:.4f}",
                ]
                for line in found.lines
                if line.seen == seen
            ],
            title=f"{seen}: items the user has seen are {_SEEN[seen]} the ranking",
        )
    spread = any(line.spread is not None for line in found.lines)
    if spread:
        console.out.print(
            "\n  ±: deviation over runs; of several runs, each user's mean is compared"
        )
    console.out.print(
        f"{'' if spread else chr(10)}"
        "  difference: mean over users with its 95% bootstrap interval; p: two-sided paired\n"
        f"  randomisation test over users, {SIGNS:,} random signs, so at least"
        f" {1 / (1 + SIGNS):.4f}; not corrected\n"
        "  for their number, and silent on the luck of a training seed"
    )


def _difference(test: "PairedTest") -> str:
    low, high = (f"{value:.4f}".replace("0.", ".", 1) for value in (test.low, test.high))
    return f"{test.difference:+.4f} [{low}, {high}]"
