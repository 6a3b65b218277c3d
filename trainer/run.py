"""A run: one training of one recommender on one dataset, and the folder that keeps it."""

import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w
import torch

from features.dataset import load_dataset
from features.errors import UserError
from features.files import lock, write_table, write_text
from features.schema import METRICS
from features.store import FeatureStore
from features.warehouse import Warehouse
from retrieval.metrics import per_user
from trainer.config import TrainConfig, build, documents
from trainer.data import TrainingData
from trainer.inputs import choose_device, choose_tables, load_features
from trainer.loop import EpochRow, Tick, check_monitor, fit
from trainer.models import find_model
from trainer.recommender import Catalogue, Recommender


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenRun:
    """A run with its model and data on the device."""

    folder: Path
    dataset: str
    model_name: str
    tables: list[str]
    """``modality=backbone`` of each feature table."""
    config: TrainConfig
    model: Recommender
    data: TrainingData
    identity: dict[str, Any]
    """What a checkpoint of this run is for."""
    parameters: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainReport:
    """How a training ended."""

    run: str
    dataset: str
    model: str
    features: list[str]
    parameters: int
    device: str
    epochs: int
    best_epoch: int
    monitor: str
    best: float
    seconds: float
    finished: bool


def start_run(
    warehouse: Warehouse,
    model: str,
    dataset: str,
    *,
    features: Sequence[str] | None = None,
    file: Path | None = None,
    settings: Sequence[str] = (),
    name: str | None = None,
) -> OpenRun:
    """Build a new run and its folder; nothing is trained yet.

    Args:
        warehouse: Where the data are and the run goes.
        model: Name in ``trainer.models.MODELS``.
        dataset: A prepared dataset.
        features: Feature tables, see :func:`trainer.inputs.choose_tables`.
        file: TOML file with settings.
        settings: ``key=value`` pairs.
        name: The run's name; by default made of time, dataset and model.

    Raises:
        UserError: Anything that the user gave does not fit; no folder is left behind.
    """
    entry = find_model(model)
    config_class, _ = entry.load()
    train, model_config = build(config_class, file, settings, entry.train)
    check_monitor(train, list(per_user(np.ones(1, np.int64))))
    if features and not entry.needs_features:
        raise UserError(f"{model} learns from item ids alone; leave --features out")
    tables = (
        choose_tables(FeatureStore(warehouse), dataset, features) if entry.needs_features else []
    )
    labels = [table.label for table in tables]
    stamp = datetime.now(UTC)
    folder = warehouse.runs_dir / _run_name(warehouse, name, stamp, dataset, model)
    run = _open(warehouse, folder, model, dataset, labels, train, model_config)
    document = {
        "run": {
            "model": model,
            "dataset": dataset,
            "features": labels,
            "created": stamp.isoformat(sep=" ", timespec="milliseconds").removesuffix("+00:00"),
            "parameters": run.parameters,
            "fingerprint": run.data.dataset.info.fingerprint,
        },
        **documents(train, model_config),
    }
    write_text(folder / "config.toml", tomli_w.dumps(document))
    return run


def open_run(warehouse: Warehouse, folder: Path) -> OpenRun:
    """Build what the folder of a run describes: model and data, weights not yet loaded.

    Raises:
        UserError: The folder is damaged, or the dataset has been prepared anew since.
    """
    path = folder / "config.toml"
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        about = document["run"]
        model, dataset, labels = about["model"], about["dataset"], about["features"]
        fingerprint = about["fingerprint"]
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); train again") from None
    config_class, _ = find_model(model).load()
    train, model_config = build(config_class, path, ())
    held = warehouse.info(dataset).fingerprint
    if held != fingerprint:
        raise UserError(
            f"run {folder.name!r} was trained on another preparation of {dataset!r};"
            " prepare it as it was, or train again"
        )
    return _open(warehouse, folder, model, dataset, labels, train, model_config)


def train(
    run: OpenRun,
    *,
    resume: bool = False,
    on_tick: Callable[[Tick], None] = lambda tick: None,
) -> TrainReport:
    """Train a run to its end or to an interrupt; the metrics table grows with each epoch."""
    path = run.folder / "metrics.parquet"
    began = time.monotonic()
    with lock(run.folder / ".lock", f"run {run.folder.name}"):
        progress = fit(
            run.model,
            run.data,
            run.config,
            run.folder,
            run.identity,
            resume=resume,
            on_epoch=lambda row: _record(path, run.model_name, row),
            on_tick=on_tick,
        )
    return TrainReport(
        run=run.folder.name,
        dataset=run.dataset,
        model=run.model_name,
        features=run.tables,
        parameters=run.parameters,
        device=str(run.data.device),
        epochs=progress.epoch,
        best_epoch=progress.best_epoch,
        monitor=f"{run.config.monitor} on validation, {run.config.monitor_seen}",
        best=progress.best,
        seconds=time.monotonic() - began,
        finished=progress.finished,
    )


def _open(
    warehouse: Warehouse,
    folder: Path,
    model: str,
    dataset: str,
    labels: list[str],
    train_config: TrainConfig,
    model_config: Any,
) -> OpenRun:
    device = choose_device(train_config.device)
    loaded = load_dataset(warehouse, dataset)
    tables = choose_tables(FeatureStore(warehouse), dataset, labels)
    features, identities = load_features(tables, loaded.info, device)
    _, recommender = find_model(model).load()
    torch.manual_seed(train_config.seed)  # weights are drawn on the CPU: the same on any device
    catalogue = Catalogue(n_items=loaded.info.items, widths=features.widths)
    module: Recommender = recommender(model_config, catalogue)
    identity = {
        "model": model,
        "dataset": dataset,
        "items": loaded.info.fingerprint,
        "interactions": loaded.digest(),
        "features": identities,
        **documents(train_config, model_config),
    }
    return OpenRun(
        folder=folder,
        dataset=dataset,
        model_name=model,
        tables=labels,
        config=train_config,
        model=module.to(device),
        data=TrainingData(loaded, features, device),
        identity=identity,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
    )


def _run_name(
    warehouse: Warehouse, name: str | None, stamp: datetime, dataset: str, model: str
) -> str:
    if name is None:
        name = f"{stamp:%Y%m%d-%H%M%S}-{dataset}-{model}"
        if (warehouse.runs_dir / name).exists():
            name = f"{stamp:%Y%m%d-%H%M%S-%f}-{dataset}-{model}"
    Warehouse.check_name(name)
    if (warehouse.runs_dir / name).exists():
        raise UserError(f"run {name!r} is there already; give another name, or --resume")
    return name


def _record(path: Path, model: str, row: EpochRow) -> None:
    """Put an epoch's rows into the metrics table, in place of any it held of this epoch on."""
    values: list[tuple[str, str, str, float, int | None]] = [
        ("train", "none", "loss", row.loss, None)
    ]
    values += [
        ("validation", seen, metric, value, row.users)
        for (seen, metric), value in row.metrics.items()
    ]
    rows = [
        {
            "phase": "train", "epoch": row.epoch, "split": split, "targets": "all",
            "ranker": model, "seen": seen, "metric": metric, "value": value, "users": users,
        }
        for split, seen, metric, value, users in values
    ]  # fmt: skip
    replace_metrics(
        path, rows, lambda held: held["phase"] == "train" and held["epoch"] >= row.epoch
    )


def replace_metrics(
    path: Path, rows: list[dict[str, Any]], replaced: Callable[[dict[str, Any]], bool]
) -> None:
    """Add rows to a run's metrics table; those already there for which ``replaced`` holds go."""
    held = pq.read_table(path, schema=METRICS).to_pylist() if path.exists() else []
    rows = [row for row in held if not replaced(row)] + rows
    write_table(path, pa.Table.from_pylist(rows, schema=METRICS), compression="zstd")
