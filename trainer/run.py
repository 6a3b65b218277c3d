"""A run: one training of one recommender on one dataset, begun, opened again and trained."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tomli_w
import torch

from features.dataset import load_dataset
from features.errors import UserError
from features.files import write_text
from features.store import FeatureStore
from features.warehouse import Warehouse
from trainer.config import TrainConfig, build, documents
from trainer.data import TrainingData
from trainer.folder import check_run_name, claimed, read_about, record, run_lock
from trainer.inputs import choose_device, choose_tables, load_features
from trainer.loop import Tick, fit
from trainer.models import find_model
from trainer.recommender import Catalogue, Recommender
from trainer.tasks import NextItem, check_trainable
from trainer.transfer import FULL, Taken, check_transfer, take_weights


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
    taken: Taken | None = None
    """What a run that begins got from another one."""


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
    init: str | None = None,
    transfer: str = FULL,
) -> OpenRun:
    """Build a new run and its folder; nothing is trained yet.

    The folder is made before the data are loaded, so that no other run can take its name, and is a
    run for all who list them once it has its ``config.toml``.

    Args:
        warehouse: Where the data are and the run goes.
        model: Name in ``trainer.models.MODELS``.
        dataset: A prepared dataset.
        features: Feature tables, see :func:`trainer.inputs.choose_tables`.
        file: TOML file with settings.
        settings: ``key=value`` pairs.
        name: The run's name; by default made of time, dataset and model.
        init: The run whose best weights it starts from.
        transfer: Which of them, see :func:`trainer.transfer.take_weights`.

    Raises:
        UserError: Anything that the user gave does not fit; no folder is left behind.
    """
    entry = find_model(model)
    if name is not None:
        check_run_name(name)
    warehouse.info(dataset)
    config_class, recommender = entry.load()
    source = None if init is None else warehouse.choose_run(init)[0]
    check_transfer(transfer, recommender)
    train, model_config = build(config_class, file, settings, entry.train)
    if features and not entry.needs_features:
        raise UserError(f"{model} learns from item ids alone; leave --features out")
    tables = (
        choose_tables(FeatureStore(warehouse), dataset, features) if entry.needs_features else []
    )
    for table in tables:
        if table.level != "pooled" and not entry.reads_tokens:
            raise UserError(
                f"{model} reads pooled vectors, not {table.label};"
                " name a pooled table by --features"
            )
    labels = [table.label for table in tables]
    stamp = datetime.now(UTC)
    with claimed(warehouse.runs_dir, name, stamp, f"{dataset[:60]}-{model}") as folder:
        run = _open(warehouse, folder, model, dataset, labels, train, model_config)
        if source is not None:
            taken = take_weights(source, model, run.model, run.identity, transfer)
            identity = {**run.identity, "init": taken.remembered()}
            run = replace(run, identity=identity, taken=taken)
        document = {
            "run": {
                "model": model,
                "dataset": dataset,
                "features": labels,
                "created": stamp.isoformat(sep=" ", timespec="milliseconds").removesuffix("+00:00"),
                "parameters": run.parameters,
                "fingerprint": run.data.dataset.info.fingerprint,
                **({"init": run.taken.remembered()} if run.taken else {}),
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
    about = read_about(path)
    model, dataset, labels = about["model"], about["dataset"], about["features"]
    try:
        config_class, _ = find_model(model).load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    train, model_config = build(config_class, path, ())
    held = warehouse.info(dataset).fingerprint
    if held != about["fingerprint"]:
        raise UserError(
            f"run {folder.name!r} was trained on another preparation of {dataset!r};"
            " prepare it as it was, or train again"
        )
    run = _open(warehouse, folder, model, dataset, labels, train, model_config)
    if "init" in about:  # a checkpoint is for where its training came from, too
        run = replace(run, identity={**run.identity, "init": about["init"]})
    return run


def train(
    run: OpenRun,
    *,
    resume: bool = False,
    on_tick: Callable[[Tick], None] = lambda tick: None,
) -> TrainReport:
    """Train a run to its end or to an interrupt; the metrics table grows with each epoch.

    The first epoch drops what an evaluation has written: it was of weights that may now change.
    A run that has ended is not trained, and keeps it.

    Raises:
        UserError: Another process has the run, its checkpoint cannot be used, or it diverges.
    """
    path = run.folder / "metrics.parquet"
    began = time.monotonic()
    with run_lock(run.folder):
        progress = fit(
            NextItem(run.model, run.data),
            run.config,
            run.folder,
            run.identity,
            resume=resume,
            on_epoch=lambda row: record(path, run.model_name, row),
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
    check_trainable(loaded)
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
