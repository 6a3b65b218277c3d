"""``mmrec compare``: metrics of several runs, with paired tests of their differences."""

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import console
from cli.options import JsonOption, WarehouseOption
from features.errors import UserError
from features.warehouse import Warehouse

if TYPE_CHECKING:
    from retrieval.significance import PairedTest
    from trainer.analysis.compare import Comparison, SystemMetric

_TITLES = {
    "filtered": "filtered: seen items are filtered from the ranking",
    "kept": "kept: seen items are kept in the ranking",
}


def compare(
    runs: Annotated[list[str], typer.Argument(help="Evaluated runs; the first is the reference.")],
    split: Annotated[str, typer.Option("--split", help="test or validation.")] = "test",
    targets: Annotated[
        str,
        typer.Option(
            "--targets",
            help="all, new, repeated (the user had it), cold (fewer than 10 interactions), hidden"
            " (items of --hide-items), or cold-occurrences (cold items at all positions).",
        ),
    ] = "all",
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            help="Metric such as NDCG@20; repeatable. Default: HR and NDCG at 10 and 50, and MRR.",
        ),
    ] = None,
    by: Annotated[
        str,
        typer.Option(
            "--by", help="Runs averaged as one: run (none), model, or settings (all but the seed)."
        ),
    ] = "run",
    control: Annotated[
        bool,
        typer.Option(
            "--control",
            help="Compare one run, or runs of several seeds, with their controls: the same"
            " trainings on features without content. A missing one is named with its command.",
        ),
    ] = False,
    json: JsonOption = False,
    root: WarehouseOption = None,
) -> None:
    """Compare runs on the same users: difference, confidence interval, paired test."""
    warehouse = Warehouse(root)
    if control:
        runs, by = _with_controls(warehouse, runs, by, root), "settings"
    from trainer.analysis.compare import DEFAULT_METRICS
    from trainer.analysis.compare import compare as compare_runs

    with console.ProgressLine() as line:
        comparison = compare_runs(
            warehouse,
            runs,
            split=split,
            targets=targets,
            metrics=metric or DEFAULT_METRICS,
            by=by,
            on_stage=line.update,
        )
    if json:
        console.emit_json(asdict(comparison))
    else:
        show_comparison(comparison)


def _with_controls(warehouse: Warehouse, runs: list[str], by: str, root: Path | None) -> list[str]:
    """Return the runs after their controls."""
    from trainer.runs.control import with_controls

    if by not in ("run", "settings"):
        raise UserError(f"--control averages the seeds of one system; leave --by {by} out")
    place = f" --warehouse {shlex.quote(str(root))}" if root else ""
    return with_controls(warehouse, runs, place)


def show_comparison(comparison: "Comparison") -> None:
    """Print a table for each ranking; the reference is the first row of each metric."""
    from trainer.analysis.compare import SEEN, SIGNS
    from trainer.data.control import NONE, control_line

    reference = comparison.systems[0].label
    shown = _shown_labels(comparison)
    subset = "" if comparison.targets == "all" else f", {comparison.targets} targets only"
    unit = "users"
    if comparison.targets == "cold-occurrences":
        subset, unit = f", {comparison.targets}", "sequences"
    console.print_text(
        f"{comparison.dataset}, {comparison.split}{subset}: {comparison.users:,} {unit};"
        f" differences to {shown[reference]}"
    )
    for system in comparison.systems:
        runs = f"runs {', '.join(system.runs)}" if len(system.runs) > 1 else ""
        facts = "; ".join(filter(None, (system.settings, runs)))
        if facts:
            console.print_text(f"{shown[system.label]}: {facts}", indent=2)
    for seen in [seen for seen in SEEN if any(line.seen == seen for line in comparison.lines)]:
        console.out.print()
        console.table(
            ["metric", "run", "value", "difference", "p"],
            [_row(line, reference, shown) for line in comparison.lines if line.seen == seen],
            title=_TITLES[seen],
        )
    console.out.print()
    console.print_text(
        f"{comparison.repeated:.2%} of the targets are repeated: the user already had them;"
        " filtered, they are misses.",
        indent=2,
    )
    for control in dict.fromkeys(system.control for system in comparison.systems):
        if control != NONE:
            console.print_text(control_line(control), indent=2)
    for fact in comparison.protocol:
        console.print_text(fact, indent=2)
    if any(line.spread is not None for line in comparison.lines):
        console.print_text(
            "±: standard deviation over runs; differences are between means over runs.",
            indent=2,
        )
    console.print_text("difference: mean over users with its 95% bootstrap interval.", indent=2)
    console.print_text(
        f"p: two-sided paired randomisation test over users with {SIGNS:,} random signs, so at"
        f" least {1 / (1 + SIGNS):.4f}; not corrected for the number of tests. Neither covers the"
        " variation between training seeds.",
        indent=2,
    )


def _shown_labels(comparison: "Comparison") -> dict[str, str]:
    """Return the label of each system with the mark of its control."""
    from trainer.data.control import marked

    return {
        system.label: system.label
        if "control:" in system.label
        else marked(system.label, system.control)
        for system in comparison.systems
    }


def _row(line: "SystemMetric", reference: str, shown: Mapping[str, str]) -> list[str | None]:
    spread = "" if line.spread is None else f" {console.format_spread(line.spread)}"
    return [
        line.metric if line.system == reference else "",
        shown[line.system],
        f"{line.value:.4f}{spread}",
        None if line.test is None else _difference(line.test),
        None if line.test is None else f"{line.test.p_value:.4f}",
    ]


def _difference(test: "PairedTest") -> str:
    return f"{test.difference:+.4f} {console.format_interval(test.low, test.high)}"
