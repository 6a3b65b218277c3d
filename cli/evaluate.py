"""``mmrec models``, ``train`` and ``eval``: stage 2."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import console
from cli.options import DeviceOption, JsonOption, WarehouseOption
from features.errors import UserError, unknown
from features.warehouse import Warehouse

if TYPE_CHECKING:
    from trainer.runs.evaluate import EvalReport

_PROTOCOLS = ("ranking", "retrieval")


def evaluate(
    index: Annotated[str, typer.Option("--index", help="What ranks the catalogue.")] = "faiss",
    run: Annotated[str | None, typer.Option("--run", help="Else the last one.")] = None,
    protocol: Annotated[
        str,
        typer.Option("--protocol", help="ranking: held-out targets; retrieval: text to vision."),
    ] = "ranking",
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="With retrieval: the items of another dataset.")
    ] = None,
    device: DeviceOption = None,
    json: JsonOption = False,
    root: WarehouseOption = None,
) -> None:
    """Rank every held-out target of a run in the full catalogue, validation and test."""
    from retrieval.indexes import INDEXES

    if index not in INDEXES:
        raise unknown("index", index, list(INDEXES))
    if protocol not in _PROTOCOLS:
        raise unknown("protocol", protocol, list(_PROTOCOLS))
    if dataset is not None and protocol == "ranking":
        raise UserError(f"--dataset {dataset} goes with --protocol retrieval; a run has its own")
    warehouse = Warehouse(root)
    folder, why = warehouse.choose_run(run)
    if why != "given":
        console.notify(f"run: {folder.name} ({why})")
    if protocol == "retrieval":
        _retrieve(warehouse, folder, dataset, device, json)
        return
    report = run_evaluate(warehouse, folder, index, device)
    if json:
        console.emit_json(asdict(report))
    else:
        show_evaluated(report)


def _retrieve(
    warehouse: Warehouse, folder: Path, dataset: str | None, device: str | None, json: bool
) -> None:
    from trainer.runs.evaluate_cross_modal import evaluate_retrieval
    from trainer.runs.run import open_run

    with console.ProgressLine(interval=0.0) as line:
        run = open_run(warehouse, folder, device)
        report = evaluate_retrieval(warehouse, run, dataset=dataset, on_stage=line.update)
    if json:
        console.emit_json(asdict(report))
        return
    reads = ", ".join(report.features)
    console.out.print(f"run {report.run}: {report.model}, {reads}; {report.dataset}")
    cells = {(r["split"], r["targets"], r["metric"], r["ranker"]): r for r in report.rows}
    rankers = list(dict.fromkeys(r["ranker"] for r in report.rows))
    metrics = list(dict.fromkeys(r["metric"] for r in report.rows))
    groups = dict.fromkeys((r["split"], r["targets"], r["users"]) for r in report.rows)
    for split, direction, queries in groups:
        console.out.print()
        console.table(
            ["metric", *rankers],
            [[m, *(_interval(cells[split, direction, m, r]) for r in rankers)] for m in metrics],
            title=f"{split}, {direction}: {queries:,} items",
        )
    console.out.print()
    for text in report.protocol:
        console.out.print(f"  {text}")


def run_evaluate(
    warehouse: Warehouse, folder: Path, index: str, device: str | None = None
) -> "EvalReport":
    """Evaluate a run, telling on one live line what is being done."""
    from trainer.runs.evaluate import evaluate as go
    from trainer.runs.run import open_run

    with console.ProgressLine(interval=0.0) as line:
        return go(warehouse, open_run(warehouse, folder, device), index=index, on_stage=line.update)


def show_evaluated(report: "EvalReport") -> None:
    """Print the metrics with both rankings side by side, the reference, and the protocol."""
    reads = f", {', '.join(report.features)}" if report.features else ""
    console.out.print(
        f"run {report.run}: {report.model} on {report.dataset}{reads}; index {report.index}"
    )
    cells = {
        (r["split"], r["targets"], r["metric"], r["ranker"], r["seen"]): r for r in report.rows
    }
    groups = dict.fromkeys((r["split"], r["targets"], r["users"]) for r in report.rows)
    metrics = list(dict.fromkeys(r["metric"] for r in report.rows))
    columns = [(r, s) for r in (report.model, "popularity") for s in ("filtered", "kept")]
    shown: dict[str, Callable[[dict[str, Any]], Any]] = {
        report.model: _interval,
        "popularity": lambda row: row["value"],
    }
    for split, targets, users in groups:
        kind = "" if targets == "all" else ", cold targets only"
        console.out.print()
        console.table(
            ["metric", *(f"{ranker}\n{seen}" for ranker, seen in columns)],
            [
                [metric, *(shown[c[0]](cells[split, targets, metric, *c]) for c in columns)]
                for metric in metrics
            ],
            title=f"{split}{kind}: {users:,} users",
        )
    console.out.print()
    for line in report.protocol:
        console.out.print(f"  {line}")


def _interval(row: dict[str, Any]) -> str:
    low, high = (f"{row[key]:.4f}".removeprefix("0") for key in ("low", "high"))
    return f"{row['value']:.4f} [{low}, {high}]"
