"""``mmrec eval``: rank the held-out targets of a run, and print the metrics."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import console
from cli.options import (
    DeviceOption,
    IndexOption,
    JsonOption,
    RunArgument,
    TrainedRunOption,
    WarehouseOption,
    choose_run,
)
from features.errors import UserError, unknown
from features.process_watch import is_later_process
from features.warehouse import Warehouse

if TYPE_CHECKING:
    from trainer.runs.evaluate import EvalReport, Sample

_PROTOCOLS = ("ranking", "retrieval")


def evaluate(
    name: RunArgument = None,
    index: IndexOption = "faiss",
    run: TrainedRunOption = None,
    protocol: Annotated[
        str,
        typer.Option(
            "--protocol", help="ranking, or retrieval: vision by text, next to ridge regression."
        ),
    ] = "ranking",
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            help="Measure on this dataset as it is now: a later preparation, or another dataset."
            " With --protocol retrieval: its items.",
        ),
    ] = None,
    users: Annotated[
        int | None,
        typer.Option(
            "--users", min=1, help="Test on a random sample of N users; nothing is stored."
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the sample of --users.")] = 0,
    device: DeviceOption = None,
    json: JsonOption = False,
    root: WarehouseOption = None,
) -> None:
    """Evaluate a run: rank every validation and test target in the full catalogue.

    A pre-training on histories is evaluated on each of its datasets. With --dataset, the targets
    that the run has trained on are left out, and the results are stored apart.
    """
    _check_options(protocol, users, seed)
    console.err.quiet = is_later_process()
    warehouse = Warehouse(root)
    folder = choose_run(warehouse, name, run)

    from trainer.distributed import process_group
    from trainer.runs.folder import read_about

    if protocol == "retrieval":
        _retrieve(warehouse, folder, dataset, device, json)
        return
    sample = None if users is None else (users, seed)
    if dataset is not None:
        report = _evaluate_later(warehouse, folder, dataset, index, device, sample)
    elif read_about(folder / "config.toml").get("stage"):
        _evaluate_sources(warehouse, folder, index, device, sample, json=json)
        return
    else:
        with process_group():
            report = run_evaluate(warehouse, folder, index, device, sample)
    if is_later_process():
        return
    if json:
        console.emit_json(asdict(report))
    else:
        show_evaluated(report)


def _check_options(protocol: str, users: int | None, seed: int) -> None:
    if protocol not in _PROTOCOLS:
        raise unknown("protocol", protocol, list(_PROTOCOLS))
    if users is not None and protocol == "retrieval":
        raise UserError(f"--users {users} goes with --protocol ranking; leave it out")
    if users is None and seed:
        raise UserError(f"--seed {seed} is the seed of a sample; give --users N with it")


def _retrieve(
    warehouse: Warehouse, folder: Path, dataset: str | None, device: str | None, json: bool
) -> None:
    from trainer.data.control import marked
    from trainer.distributed import check_single_process
    from trainer.runs.evaluate_cross_modal import evaluate_retrieval
    from trainer.runs.run import open_run

    check_single_process("mmrec eval --protocol retrieval")
    with console.ProgressLine(interval=0.0) as line:
        run = open_run(warehouse, folder, device=device)
        report = evaluate_retrieval(warehouse, run, dataset=dataset, on_stage=line.update)
    if json:
        console.emit_json(asdict(report))
        return
    features = ", ".join(report.features)
    model = marked(report.model, report.control)
    console.print_text(f"run {report.run}: {model}, {features}; {report.dataset}")
    cells = {(r["split"], r["targets"], r["metric"], r["ranker"]): r for r in report.rows}
    rankers = list(dict.fromkeys(r["ranker"] for r in report.rows))
    metrics = list(dict.fromkeys(r["metric"] for r in report.rows))
    groups = dict.fromkeys((r["split"], r["targets"], r["users"]) for r in report.rows)
    for split, direction, queries in groups:
        console.out.print()
        console.table(
            ["metric", *rankers],
            [
                [metric, *(format_figure(cells[split, direction, metric, r]) for r in rankers)]
                for metric in metrics
            ],
            title=f"{split}, {direction}: {queries:,} items",
        )
    console.out.print()
    for text in report.protocol:
        console.print_text(text, indent=2)


def _evaluate_sources(
    warehouse: Warehouse,
    folder: Path,
    index: str,
    device: str | None,
    users_and_seed: tuple[int, int] | None,
    *,
    json: bool,
) -> None:
    """Evaluate a pre-training on each of its datasets, and print the reports."""
    from trainer.distributed import check_single_process
    from trainer.runs.evaluate_sources import evaluate_sources
    from trainer.runs.run import open_run

    check_single_process("mmrec eval of a pre-training")
    with console.ProgressLine(interval=0.0) as line:
        run = open_run(warehouse, folder, device=device)
        sample = _sample(users_and_seed)
        reports = evaluate_sources(warehouse, run, index=index, sample=sample, on_stage=line.update)
    if json:
        console.emit_json({"run": run.name, "sources": [asdict(report) for report in reports]})
        return
    for report in reports:
        show_evaluated(report)


def _evaluate_later(
    warehouse: Warehouse,
    folder: Path,
    dataset: str,
    index: str,
    device: str | None,
    users_and_seed: tuple[int, int] | None,
) -> "EvalReport":
    """Evaluate a run on a dataset as it is prepared now."""
    from trainer.distributed import check_single_process
    from trainer.runs.evaluate_later import evaluate_later

    check_single_process("mmrec eval --dataset")
    with console.ProgressLine(interval=0.0) as line:
        return evaluate_later(
            warehouse,
            folder,
            dataset,
            index=index,
            sample=_sample(users_and_seed),
            device=device,
            on_stage=line.update,
        )


def _sample(users_and_seed: tuple[int, int] | None) -> "Sample | None":
    from trainer.runs.evaluate import Sample

    if users_and_seed is None:
        return None
    return Sample(users=users_and_seed[0], seed=users_and_seed[1])


def run_evaluate(
    warehouse: Warehouse,
    folder: Path,
    index: str,
    device: str | None = None,
    users_and_seed: tuple[int, int] | None = None,
) -> "EvalReport":
    """Evaluate a run, or a sample of its test users, and show the current step on a live line."""
    from trainer.runs.evaluate import evaluate as evaluate_run
    from trainer.runs.later import open_as_trained

    with console.ProgressLine(interval=0.0) as line:
        run = open_as_trained(warehouse, folder, device=device)
        sample = _sample(users_and_seed)
        return evaluate_run(warehouse, run, index=index, sample=sample, on_stage=line.update)


def show_evaluated(report: "EvalReport") -> None:
    """Print both rankings of the model and of the references, and the protocol.

    The tables of an evaluation on a later preparation are marked.
    """
    features = f", {', '.join(report.features)}" if report.features else ""
    from trainer.data.control import marked

    mark = "" if report.later is None else f", {report.later.kind}"
    place = f"{report.dataset}{mark}{features}; index {report.index}"
    console.print_text(f"run {report.run}: {marked(report.model, report.control)} on {place}")
    if report.search.line:
        console.print_text(f"index {report.index}: {report.search.line}")
    cells = {
        (r["split"], r["targets"], r["metric"], r["ranker"], r["seen"]): r for r in report.rows
    }
    groups = dict.fromkeys((r["split"], r["targets"], r["users"]) for r in report.rows)
    metrics: dict[tuple[str, str], dict[str, None]] = {}
    for row in report.rows:
        metrics.setdefault((row["split"], row["targets"]), {})[row["metric"]] = None
    counts = {(split, targets): users for split, targets, users in groups}
    rankers = list(dict.fromkeys(r["ranker"] for r in report.rows))

    def column(group: tuple[str, str], ranker: str, seen: str) -> console.Column:
        rows = [cells[*group, metric, ranker, seen] for metric in metrics[group]]
        values = map(format_figure, rows) if ranker == report.model else (r["value"] for r in rows)
        title = marked(ranker, report.control) if ranker == report.model else ranker
        return f"{title}\n{seen}", list(values)

    sample = "" if report.sample is None else "sample of "
    for split, targets, users in groups:
        kind = "" if targets == "all" else f", {targets} targets only"
        unit = "users"
        if targets == "cold-occurrences":
            kind, unit = f", {targets}", "sequences"
        share = counts.get((split, "repeated"), 0) / counts[split, "all"]
        repeated = f", {share:.2%} repeated targets" if targets == "all" else ""
        rankings = ("kept",) if targets == "repeated" else ("filtered", "kept")
        console.out.print()
        console.stacked_tables(
            [("metric", list(metrics[split, targets]))],
            [[column((split, targets), ranker, seen) for seen in rankings] for ranker in rankers],
            title=f"{split}{mark}{kind}: {sample}{users:,} {unit}{repeated}",
        )
    console.out.print()
    for text in report.protocol:
        console.print_text(text, indent=2)


def format_figure(row: dict[str, Any], *, interval: bool = True) -> str:
    """Return the value of a row of the metrics table, with its interval where there is one."""
    if row["low"] is None or not interval:
        return f"{row['value']:.4f}"
    return f"{row['value']:.4f} {console.format_interval(row['low'], row['high'])}"
