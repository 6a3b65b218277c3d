"""Runs: create, open and train. A run is one training of one recommender."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from features.dataset import Dataset, load_dataset
from features.documents import write_toml
from features.errors import UserError
from features.memory import memory_errors
from features.store import FeatureStore
from features.warehouse import Warehouse
from trainer.config import TrainConfig
from trainer.data.batches import TrainingData
from trainer.data.feature_tables import choose_device, choose_tables
from trainer.data.multi_dataset import load_data
from trainer.finetune.load_checkpoint import open_blocks, read_blocks, write_blocks
from trainer.finetune.upper_blocks import UpperBlocks
from trainer.models.base import Catalogue, Recommender
from trainer.models.registry import MODELS
from trainer.runs.catalogue import JointCatalogue, write_attributes, write_catalogue
from trainer.runs.folder import (
    check_run_name,
    create_run_dir,
)
from trainer.runs.learned_interactions import write_learned
from trainer.runs.prior import add_prior
from trainer.runs.spec import PRETRAIN, RunSpec
from trainer.runs.transfer import CopiedWeights, copy_weights
from trainer.tasks.base import Task
from trainer.tasks.next_item import check_trainable
from trainer.tasks.registry import NEXT_ITEM, TASKS


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run with its model and its data on the device."""

    folder: Path
    spec: RunSpec
    warehouse: Warehouse
    """Warehouse with the data of the run."""
    model: Recommender
    data: TrainingData
    task: Task[Any]
    attribute_names: Sequence[str] = ()
    """Names of the attributes that the model reads."""
    copied_weights: CopiedWeights | None = None
    """The initial weights of a new run, if they come from another run."""
    joint: JointCatalogue | None = None
    """The items of the training and of a later preparation, if the run is opened on one; the best
    weights are loaded."""
    later: Dataset | None = None
    """All interactions of a later preparation; the model cannot read those that ``data`` lacks."""

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.folder.name

    @property
    def config(self) -> TrainConfig:
        """Settings of the loop."""
        return self.spec.train

    @property
    def weights(self) -> Path:
        """File of the best weights by validation."""
        return self.folder / "model.safetensors"

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def is_listed(self) -> npt.NDArray[np.bool_]:
        """Return the items that can be recommended: (N,) bool.

        On a later preparation, these are its items, except for new items that the model cannot
        encode: it has no features of them, or learns a vector for each item.
        """
        n_items = self.data.dataset.info.items
        if self.joint is None:
            return np.ones(n_items, dtype=bool)
        is_listed_U = self.joint.is_current_U
        if self.model.learns_by_gradients:
            is_listed_U &= self.joint.is_learned_U | self.is_encoded()
        return is_listed_U

    def catalogue_lines(self) -> list[str]:
        """Describe a later catalogue for people; no lines for the catalogue of the training."""
        if self.joint is None:
            return []
        model = None if self.model.encodes_new_items else self.spec.model
        return self.joint.lines(self.is_listed(), model)

    def is_encoded(self) -> npt.NDArray[np.bool_]:
        """Return the items whose features the model can rank without training: (N,) bool."""
        features = self.data.features
        if not (self.model.encodes_new_items and features.present):
            return np.zeros(features.n_items, dtype=bool)
        present = torch.stack(list(features.present.values())).any(0)
        return np.asarray(present.cpu().numpy(), dtype=bool)

    def check_recommends(self) -> None:
        """Raise a UserError if the run is a pre-training; the message names the next command."""
        if self.spec.is_pretraining:
            also = ", or see mmrec eval --protocol retrieval" if self.task.pools else ""
            raise UserError(
                f"run {self.name!r} is a pre-training and recommends nothing; start one from it:"
                f" mmrec train --model {self.spec.model} --init {self.name}{also}"
            )


def create_run(
    warehouse: Warehouse,
    spec: RunSpec,
    *,
    name: str | None = None,
    check: Callable[[Run], object] = lambda run: None,
) -> Run:
    """Create a run's folder and build its model and data, without training.

    The folder is created before the data are loaded, so that no other run can take its name. A
    folder with a ``config.toml`` is a run.

    Args:
        warehouse: Warehouse with the data; the run is written to it.
        spec: The run.
        name: Name of the run; by default made of time, dataset and model.
        check: Called with the run; if it raises an exception, the run is not created.

    Raises:
        UserError: The name is taken, or the data cannot be used. The folder is removed.
    """
    spec.check_given_weights()
    if name is not None:
        check_run_name(name)
    backbones = _load_backbones(warehouse, spec)
    stamp = datetime.now(UTC)
    suffix = f"-{PRETRAIN}" if spec.is_pretraining else ""
    title = f"{spec.dataset[:60]}-{spec.model}{suffix}"
    with create_run_dir(warehouse.runs_dir, name, stamp, title) as folder:
        run = _build_run(warehouse, folder, spec, backbones)
        if backbones:
            write_blocks(folder, backbones)
        if spec.init is not None:
            remedy = "wait until its training has ended, and try again"
            run = replace(run, copied_weights=_copy_initial_weights(warehouse, run, remedy))
        check(run)
        if spec.attributes.columns:
            write_attributes(folder, run.attribute_names)
        item_ids = write_catalogue(folder, warehouse, spec.datasets)
        write_learned(folder, warehouse, spec, run.data, item_ids)
        document = spec.document()
        document["run"]["created"] = _utc_text(stamp)
        document["run"]["parameters"] = run.parameters
        write_toml(folder / "config.toml", document)
    return run


def plan_run(warehouse: Warehouse, spec: RunSpec) -> Run:
    """Build the model and data of a run that is not created. Nothing is written.

    Raises:
        UserError: The data cannot be used.
    """
    spec.check_given_weights()
    folder = warehouse.runs_dir / "planned"
    return _build_run(warehouse, folder, spec, _load_backbones(warehouse, spec))


def open_run(warehouse: Warehouse, folder: Path, *, device: str | None = None) -> Run:
    """Build the model and data of a run, without loading its weights.

    A run that was stopped before its first save gets its initial weights. The buffers that a model
    with parameters fits are not fitted again if there are saved weights, which hold them.

    Args:
        warehouse: Warehouse with the run and its data.
        folder: Folder of the run.
        device: Device of model and data; by default the device that it was trained on.

    Raises:
        UserError: The folder is damaged, or the data have changed since the run was created.
    """
    spec = RunSpec.read(warehouse, folder)
    backbones = read_blocks(folder) if spec.train.tune_blocks else {}
    is_saved = any((folder / f"{kind}.safetensors").exists() for kind in ("model", "resume"))
    run = _build_run(warehouse, folder, spec, backbones, device, is_saved=is_saved)
    if spec.init is not None and not is_saved:
        _copy_initial_weights(warehouse, run, f"remove {folder} and train again")
    return run


def _build_run(
    warehouse: Warehouse,
    folder: Path,
    spec: RunSpec,
    backbones: Mapping[str, UpperBlocks],
    device_name: str | None = None,
    *,
    is_saved: bool = False,
) -> Run:
    device = choose_device(device_name or spec.train.device)
    reads_times = MODELS.find(spec.model).load().reads_times
    if spec.task == NEXT_ITEM:
        check_trainable(
            load_dataset(warehouse, spec.datasets[0]), hold_out_cold=spec.train.hold_out_cold
        )
    source = load_data(
        warehouse,
        spec.datasets,
        spec.features,
        device,
        spec.attributes,
        with_times=reads_times,
        control=spec.control,
    )
    # The weights are drawn on the CPU, so that they are equal on all devices.
    torch.manual_seed(spec.train.seed)
    catalogue = Catalogue(
        n_items=source.dataset.info.items,
        n_users=source.dataset.info.users,
        widths=source.features.widths | {name: upper.width for name, upper in backbones.items()},
        n_attributes=len(source.attribute_names),
        time_unit=source.dataset.time_unit,
        backbones=backbones,
    )
    model = build_model(spec.model, spec.settings, catalogue).to(device)
    data = TrainingData(
        source.dataset, source.features, device, hold_out_cold=spec.train.hold_out_cold
    )
    task = TASKS.find(spec.task).build(model, data, warehouse, spec.datasets, spec.task_settings)
    # Saved weights hold the fitted buffers, and loading the weights replaces them.
    if not (is_saved and model.learns_by_gradients and model.fitted_buffers):
        model.fit_buffers(task.features_to_fit(source.features), data.train)
    if not is_saved:
        model.start_history_bias(data.train)
    add_prior(folder, model, data)
    return Run(
        folder=folder,
        spec=spec,
        warehouse=warehouse,
        model=model,
        data=data,
        task=task,
        attribute_names=source.attribute_names,
    )


def build_model(name: str, settings: Any, catalogue: Catalogue) -> Recommender:
    """Build a recommender with random weights, on the CPU.

    Raises:
        UserError: The model does not fit the catalogue.
        OutOfMemoryError: The weights do not fit into memory.
    """
    place = f"the weights of {name} with these settings"
    with memory_errors(place, f"give smaller ones (see the sizes in mmrec models {name})"):
        return MODELS.find(name).load()(settings, catalogue)


def _load_backbones(warehouse: Warehouse, spec: RunSpec) -> Mapping[str, UpperBlocks]:
    if not spec.train.tune_blocks:
        return {}
    tables = choose_tables(FeatureStore(warehouse), spec.datasets[0], spec.features)
    return open_blocks(tables, spec.train.tune_blocks)


def _copy_initial_weights(warehouse: Warehouse, run: Run, remedy: str) -> CopiedWeights:
    init = run.spec.init
    assert init is not None
    source, _ = warehouse.choose_run(init.run)
    copied = copy_weights(source, run.spec.model, run.model, run.spec.identity(), init.transfer)
    if copied.digest != init.weights:
        raise UserError(
            f"run {run.name!r} was to start from run {source.name!r}, whose weights have changed"
            f" since; {remedy}"
        )
    return copied


def _utc_text(stamp: datetime) -> str:
    return stamp.isoformat(sep=" ", timespec="milliseconds").removesuffix("+00:00")
