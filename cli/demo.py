"""``mmrec demo``: the whole way on a small dataset of its own, offline."""

from typing import TYPE_CHECKING

from cli import console, evaluate, extract, prepare, training_options
from cli.options import JsonOption, WarehouseOption
from features.signals import raise_received
from features.warehouse import Warehouse

if TYPE_CHECKING:
    from trainer.runs.evaluate import EvalReport

_STATEMENT = """
    SELECT modality, backbone, count(*) AS vectors, (SELECT count(*) FROM items) AS items
    FROM features WHERE dataset = 'demo' GROUP BY ALL ORDER BY modality
"""


def demo(json: JsonOption = False, root: WarehouseOption = None) -> None:
    """Make a small dataset and run prepare, extract, train, eval and sql on it, offline.

    The features are those of the extra `offline` if it is installed, else those of `hashed`.
    """
    from dataclasses import asdict

    from features.sql_views import query
    from pipeline.backbones.listing import offline_backbone
    from pipeline.datasets.prepare import PrepareOptions
    from pipeline.extraction.options import ExtractOptions

    warehouse = Warehouse(root)
    console.notify("1. prepare: images, titles, videos, and users with a known taste")
    info = prepare.run_prepare(warehouse, PrepareOptions(dataset="demo"))
    backbones = {modality: offline_backbone(modality) for modality in ("image", "text", "video")}
    console.notify(
        f"2. extract: {backbones['image']} over images and videos, {backbones['text']} over titles"
    )
    choices = ExtractOptions(
        image=backbones["image"], text=backbones["text"], video=backbones["video"]
    )
    extracted = extract.run_extract(warehouse, "demo", choices)
    reports = {
        model: _train_and_evaluate(
            warehouse, model, _feature_tables(backbones) if model == "mmsrec" else None
        )
        for model in _TRAININGS
    }
    if json:
        evaluations = {model: asdict(report) for model, report in reports.items()}
        console.emit_json({"dataset": info.summary(), "evaluations": evaluations})
        return
    prepare.show_prepared(info)
    console.out.print()
    extract.show_extracted(extracted)
    for report in reports.values():
        console.out.print()
        evaluate.show_evaluated(report)
    console.out.print()
    console.notify("4. sql: " + " ".join(_STATEMENT.split()))
    table = query(warehouse, _STATEMENT)
    console.table(table.column_names, zip(*(c.to_pylist() for c in table.columns), strict=True))


def _train_and_evaluate(
    warehouse: Warehouse, model: str, features: list[str] | None
) -> "EvalReport":
    """Train a model on the demo and evaluate it.

    Raises:
        KeyboardInterrupt: A signal was received.
    """
    from trainer.config import SettingSources
    from trainer.runs.run import create_run, train_run
    from trainer.runs.spec import RunSpec

    sources = SettingSources(pairs=_TRAININGS[model])
    spec = RunSpec.resolve(warehouse, model, ["demo"], features=features, sources=sources)
    run = create_run(warehouse, spec)
    console.notify(f"3. train: {model}")
    watching = training_options.TrainWatch()
    try:
        ended = train_run(run, on_progress=watching)
    finally:
        watching.line.close()
    if not ended.finished:
        raise KeyboardInterrupt
    raise_received()  # a signal while the last epoch is saved does not stop the training
    return evaluate.run_evaluate(warehouse, run.folder, "faiss")


def _feature_tables(backbones: dict[str, str]) -> list[str]:
    """Return the tables of images and titles; the warehouse may have those of other backbones."""
    return [f"{modality}={backbones[modality]}" for modality in ("image", "text")]


_TRAININGS = {
    "sasrec": ["epochs=20", "patience=4"],
    "mmsrec": [
        "dim=64", "heads=4", "hidden=128", "dropout=0.2", "batch_size=64", "epochs=20",
        "patience=4",
    ],
}  # fmt: skip
