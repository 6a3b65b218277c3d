"""A run: one training of one recommender on one dataset, begun, opened again and trained."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tomli_w
import torch

from features.atomic_files import write_text
from features.dataset import load_dataset
from features.errors import UserError
from features.warehouse import Warehouse
from trainer.config import TrainConfig, build_all, documents
from trainer.data.batches import TrainingData
from trainer.data.feature_tables import choose_device
from trainer.data.multi_dataset import choose_common_tables, joint_fingerprint, load_data
from trainer.distributed import process_rank
from trainer.finetune.load_checkpoint import open_blocks, read_blocks, write_blocks
from trainer.finetune.upper_blocks import UpperBlocks
from trainer.identity import RunIdentity
from trainer.loop import TrainProgress, fit
from trainer.models.base import Catalogue, Recommender
from trainer.models.registry import MODELS, find_model
from trainer.runs.folder import check_run_name, create_run_dir, read_about, record, run_lock
from trainer.runs.transfer import FULL, Taken, check_transfer, take_weights
from trainer.tasks.next_item import NextItem, Task, check_trainable
from trainer.tasks.pretrain import STAGE, check_pretrains, pretrain_config, pretrain_task


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenRun:
    """A run with its model and data on the device."""

    folder: Path
    dataset: str
    model_name: str
    tables: list[str]
    """``modality=backbone`` of each feature table."""
    stage: str
    """``pretrain``, or empty: the run recommends."""
    config: TrainConfig
    model: Recommender
    data: TrainingData
    task: Task[Any]
    """What it does in an epoch."""
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
    dataset: str | Sequence[str],
    *,
    stage: str = "",
    features: Sequence[str] | None = None,
    file: Path | None = None,
    settings: Sequence[str] = (),
    name: str | None = None,
    init: str | None = None,
    transfer: str = FULL,
    weights: str | None = None,
) -> OpenRun:
    """Build a new run and its folder; nothing is trained yet.

    The folder is made before the data are loaded, so that no other run can take its name, and is a
    run for all who list them once it has its ``config.toml``.

    Args:
        warehouse: Where the data are and the run goes.
        model: Name in ``trainer.models.registry.MODELS``.
        dataset: A prepared dataset; for a pre-training also several.
        stage: ``pretrain``, or empty.
        features: Feature tables, see :func:`trainer.data.feature_tables.choose_tables`.
        file: TOML file with settings.
        settings: ``key=value`` pairs.
        name: The run's name; by default made of time, dataset and model.
        init: The run whose best weights it starts from.
        transfer: Which of them, see :func:`trainer.runs.transfer.take_weights`.
        weights: Hash that these must have; ``None``: any.

    Raises:
        UserError: Anything that the user gave does not fit; no folder is left behind.
    """
    entry = find_model(model)
    if name is not None:
        check_run_name(name)
    names = [dataset] if isinstance(dataset, str) else list(dataset)
    for one in names:
        warehouse.info(one)
        if names.count(one) > 1:
            raise UserError(f"--dataset names {one!r} twice; name it once")
    if stage == STAGE:
        check_pretrains(model, entry)
    _, recommender = entry.load()
    source = None if init is None else warehouse.choose_run(init)[0]
    check_transfer(transfer, recommender)
    configs = _configs(model, stage, file, settings)
    if features and not entry.needs_features:
        raise UserError(f"{model} learns from item ids alone; leave --features out")
    count = configs[0].tune_blocks
    if count and not entry.reads_tokens:
        able = ", ".join(name for name, other in MODELS.items() if other.reads_tokens)
        raise UserError(
            f"tune_blocks={count} is of recommenders that read tokens ({able}), not {model};"
            " leave it out"
        )
    tables = []
    if entry.needs_features:
        tables = choose_common_tables(warehouse, names, features, layers=count > 0)
    for table in tables:
        if table.level != "pooled" and not entry.reads_tokens:
            raise UserError(
                f"{model} reads pooled vectors, not {table.label};"
                " name a pooled table by --features"
            )
    labels = [table.label for table in tables]
    backbones = open_blocks(tables, count) if count else {}
    stamp = datetime.now(UTC)
    what = f"{'+'.join(names)[:60]}-{model}" + (f"-{STAGE}" if stage == STAGE else "")
    with create_run_dir(warehouse.runs_dir, name, stamp, what) as folder:
        run = _open(warehouse, folder, model, names, labels, stage, configs, backbones)
        if backbones:
            write_blocks(folder, backbones)
        if source is not None:
            taken = take_weights(source, model, run.model, run.identity, transfer)
            if weights not in (None, taken.digest):
                raise UserError(
                    f"run {source.name!r} has other weights than a moment ago: it is being"
                    " trained; wait for its end and try again"
                )
            identity = {**run.identity, "init": taken.remembered()}
            run = replace(run, identity=identity, taken=taken)
        document = {
            "run": {
                "model": model,
                "dataset": run.dataset,
                "features": labels,
                "created": stamp.isoformat(sep=" ", timespec="milliseconds").removesuffix("+00:00"),
                "parameters": run.parameters,
                "fingerprint": run.data.dataset.info.fingerprint,
                **({"stage": stage} if stage else {}),
                **({"sources": names} if len(names) > 1 else {}),
                **({"init": run.taken.remembered()} if run.taken else {}),
            },
            **documents(*configs),
        }
        write_text(folder / "config.toml", tomli_w.dumps(document))
    return run


def open_run(warehouse: Warehouse, folder: Path, device: str | None = None) -> OpenRun:
    """Build what the folder of a run describes: model and data, weights not yet loaded.

    Args:
        warehouse: Holds the run and its dataset.
        folder: The run's.
        device: Where to put both; else where it was trained.

    Raises:
        UserError: The folder is damaged, or the dataset has been prepared anew since.
    """
    path = folder / "config.toml"
    about = read_about(path)
    model, dataset, labels = about["model"], about["dataset"], about["features"]
    stage = about.get("stage", "")
    try:
        find_model(model)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    configs = _configs(model, stage, path, ())
    names = about.get("sources", [dataset])
    if joint_fingerprint(warehouse, names) != about["fingerprint"]:
        raise UserError(
            f"run {folder.name!r} was trained on another preparation of {dataset!r};"
            " prepare it as it was, or train again"
        )
    backbones = read_blocks(folder) if configs[0].tune_blocks else {}
    run = _open(warehouse, folder, model, names, labels, stage, configs, backbones, device)
    if "init" in about:  # a checkpoint is for where its training came from, too
        if not any((folder / f"{kind}.safetensors").exists() for kind in ("model", "resume")):
            _take_again(warehouse, run, about["init"])
        run = replace(run, identity={**run.identity, "init": about["init"]})
    return run


def _take_again(warehouse: Warehouse, run: OpenRun, init: dict[str, str]) -> None:
    """Begin once more where a run began that was killed before anything of it was saved."""
    source = warehouse.choose_run(init["run"])[0]
    taken = take_weights(source, run.model_name, run.model, run.identity, init["transfer"])
    if taken.remembered() != init:
        raise UserError(
            f"run {run.folder.name!r} was to start from run {source.name!r}, whose weights are"
            f" others now; remove {run.folder} and train again"
        )


def train(
    run: OpenRun,
    *,
    resume: bool = False,
    on_tick: Callable[[TrainProgress], None] = lambda tick: None,
) -> TrainReport:
    """Train a run to its end or to an interrupt; the metrics table grows with each epoch.

    The first epoch drops what an evaluation has written: it was of weights that may now change.
    A run that has ended is not trained, and keeps it. One to go on with that was killed before
    anything was saved begins once more.

    Raises:
        UserError: Another process has the run, its checkpoint cannot be used, or it diverges.
    """
    path = run.folder / "metrics.parquet"
    if resume and not (run.folder / "resume.safetensors").exists():
        if (run.folder / "model.safetensors").exists():
            raise UserError(
                f"{run.folder}/resume.safetensors is gone, so it cannot be gone on; its best"
                f" weights stand: mmrec eval --run {run.folder.name}, or train from them by --init"
            )
        resume = False  # killed before anything was saved: it begins once more, with the same bits
    began = time.monotonic()
    with run_lock(run.folder) if process_rank() == 0 else nullcontext():
        progress = fit(
            run.task,
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
        monitor=f"{run.config.monitor} on {run.task.split(run.config)}",
        best=progress.best,
        seconds=time.monotonic() - began,
        finished=progress.finished,
    )


def _configs(model: str, stage: str, file: Path | None, settings: Sequence[str]) -> tuple[Any, ...]:
    """The settings of the loop, of the recommender, and of the alignment where there is one."""
    entry = find_model(model)
    config_class, _ = entry.load()
    defaults, more = dict(entry.train), []
    if stage == STAGE:
        assert entry.pretrain is not None
        defaults |= entry.pretrain.settings
        more = pretrain_config(entry)
    return tuple(build_all([TrainConfig, config_class, *more], file, settings, defaults))


def _open(
    warehouse: Warehouse,
    folder: Path,
    model: str,
    datasets: list[str],
    labels: list[str],
    stage: str,
    configs: tuple[Any, ...],
    backbones: Mapping[str, UpperBlocks],
    place: str | None = None,
) -> OpenRun:
    train_config, model_config, *more = configs
    device = choose_device(place or train_config.device)
    if stage != STAGE:
        check_trainable(load_dataset(warehouse, datasets[0]))
    source = load_data(warehouse, datasets, labels, device)
    _, recommender = find_model(model).load()
    torch.manual_seed(train_config.seed)  # weights are drawn on the CPU: the same on any device
    catalogue = Catalogue(
        n_items=source.dataset.info.items, widths=source.features.widths, backbones=backbones
    )
    try:
        module: Recommender = recommender(model_config, catalogue)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        raise UserError(
            f"{model} with these settings does not fit into memory; give smaller ones"
            " (see the sizes in mmrec models)"
        ) from None
    module = module.to(device)
    data = TrainingData(source.dataset, source.features, device)
    module.fit_buffers(source.features, data.train)
    task: Task[Any] = NextItem(module, data)
    if stage == STAGE:
        task = pretrain_task(warehouse, datasets, module, data, more)
    return OpenRun(
        folder=folder,
        dataset="+".join(datasets),
        model_name=model,
        tables=labels,
        stage=stage,
        config=train_config,
        model=module,
        data=data,
        task=task,
        identity=RunIdentity(recommender=model, configs=configs, **source.identity).document(),
        parameters=sum(parameter.numel() for parameter in module.parameters()),
    )
