"""Open a run on a later preparation of its dataset, or on another dataset, without training.

The items of a run on a later preparation are the items that it has learned, in their order, and
then the new ones. So each table of the run keeps its rows, and a new item gets a row of zeros.
Weights and buffers are those of the training. An item that is no longer in the catalogue can be a
part of a history; it is not recommended.

Legend: N items that the run has learned, U items of both catalogues, M items of the later one.
"""

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from features.dataset import Dataset, EvalSplit, load_items
from features.errors import UserError
from features.provenance import IMPORTED
from features.store import FeatureStore
from features.warehouse import Warehouse
from trainer.checkpoint import IdentityError, load_tensors, load_weights, read_tensors
from trainer.data.batches import ItemFeatures, TrainingData
from trainer.data.control import NONE
from trainer.data.feature_tables import choose_device, choose_tables
from trainer.data.multi_dataset import load_data
from trainer.finetune.load_checkpoint import read_blocks
from trainer.models.base import Catalogue, Recommender
from trainer.models.registry import MODELS
from trainer.runs.catalogue import JointCatalogue, read_attributes, read_catalogue
from trainer.runs.folder import read_about
from trainer.runs.prior import add_prior
from trainer.runs.read import read_record
from trainer.runs.run import Run, build_model, open_run
from trainer.runs.spec import PRETRAIN, PreparationError, RunSpec
from trainer.tasks.registry import TASKS


def open_current(
    warehouse: Warehouse, folder: Path, dataset: str | None = None, *, device: str | None = None
) -> Run:
    """Open a run on its dataset as it is prepared now, or on another dataset.

    Args:
        warehouse: Warehouse with the run and the dataset.
        folder: Folder of the run.
        dataset: A prepared dataset; by default the one that the run was trained on.
        device: Device of model and data; by default the device that it was trained on.

    Raises:
        UserError: As for :func:`open_later`, or the folder is damaged.
    """
    own = read_about(folder / "config.toml")["dataset"]
    _check_extracted(warehouse, folder, dataset or own)
    if dataset in (None, own) and has_own_preparation(warehouse, folder):
        return open_run(warehouse, folder, device=device)
    return open_later(warehouse, folder, dataset or own, device=device)


def open_as_trained(warehouse: Warehouse, folder: Path, *, device: str | None = None) -> Run:
    """Open a run on the preparation of its training, see :func:`trainer.runs.run.open_run`.

    Raises:
        UserError: The folder is damaged, or the data have changed since. The message names the
            command that evaluates a run on the data as they are now.
    """
    try:
        return open_run(warehouse, folder, device=device)
    except PreparationError as error:
        about = read_about(folder / "config.toml")
        if about.get("stage") == PRETRAIN:
            raise
        raise PreparationError(f"{error}, {_remedy(folder.name, about['dataset'])}") from None


def load_as_trained(run: Run) -> None:
    """Load the best weights of a run on the preparation of its training.

    Raises:
        UserError: There are no weights, or they are damaged or of other data. The message names the
            command that evaluates a run on the data as they are now.
    """
    try:
        load_weights(run.weights, run.model, run.spec.identity())
    except IdentityError as error:
        if has_own_preparation(run.warehouse, run.folder):
            raise
        raise IdentityError(f"{error}, {_remedy(run.name, run.spec.dataset)}") from None


def _remedy(run: str, dataset: str) -> str:
    command = f"mmrec eval --run {run} --dataset {dataset}"
    return f"or measure the run on the dataset as it is now: {command}"


def has_own_preparation(warehouse: Warehouse, folder: Path) -> bool:
    """Return whether a run's dataset is prepared, and its features are, as at its training.

    Raises:
        UserError: The folder is damaged, or the dataset or a feature table is gone.
    """
    try:
        spec = RunSpec.read(warehouse, folder)
    except PreparationError:
        return False
    # Without weights there is no identity, and opening the run tells the user so.
    identity = read_record(warehouse, folder.name).identity
    features = [dict(table) for table in spec.data.features]
    return spec.is_pretraining or bool(identity.get("features", features) == features)


def open_later(
    warehouse: Warehouse, folder: Path, dataset: str, *, device: str | None = None
) -> Run:
    """Build the model of a run for a later preparation, and load its best weights.

    Args:
        warehouse: Warehouse with the run and the dataset.
        folder: Folder of the run.
        dataset: The prepared dataset; its feature tables have the provenance of the run's.
        device: Device of model and data; by default the device that it was trained on.

    Raises:
        UserError: The run stored no item ids or has no weights yet, the features were made in
            another way, or the model has parameters of users.
    """
    _check_extracted(warehouse, folder, dataset)
    spec = RunSpec.read(warehouse, folder, dataset=dataset)
    recommender = MODELS.find(spec.model).load()
    _check_model(folder, spec, recommender)
    on_device = choose_device(device or spec.train.device)
    attributes = spec.attributes
    if attributes.columns:
        attributes = replace(attributes, vocabulary=read_attributes(folder))
    reads_times = recommender.reads_times
    source = load_data(
        warehouse, [dataset], spec.features, on_device, attributes, with_times=reads_times
    )
    later_ids = load_items(warehouse, dataset, ["item_id"]).column("item_id").combine_chunks()
    joint = JointCatalogue.of(read_catalogue(folder), later_ids)
    features = _with_items(source.features, joint)
    torch.manual_seed(spec.train.seed)
    model = build_model(
        spec.model,
        spec.settings,
        Catalogue(
            n_items=len(joint.ids),
            n_users=source.dataset.info.users,
            widths=features.widths,
            n_attributes=len(source.attribute_names),
            time_unit=source.dataset.time_unit,
            backbones=read_blocks(folder) if spec.train.tune_blocks else {},
        ),
    ).to(on_device)
    later = _renumbered(source.dataset, joint)
    reads_all = model.encodes_new_items or not model.learns_by_gradients
    readable = later if reads_all else _without(later, joint.learned)
    data = TrainingData(readable, features, on_device)
    if model.learns_by_gradients:
        _load_extended(folder, spec, model, joint)
        model.extend_buffers(features, joint.learned)
    else:
        model.fit_buffers(features, data.train)
    add_prior(folder, model, data)
    task = TASKS.find(spec.task).build(model, data, warehouse, [dataset], spec.task_settings)
    own = Run(folder=folder, spec=spec, warehouse=warehouse, model=model, data=data, task=task)
    return replace(own, joint=joint, later=later)


def _check_extracted(warehouse: Warehouse, folder: Path, dataset: str) -> None:
    """Refuse feature tables of an earlier preparation, with one command for all of them.

    Imported tables are left to :meth:`features.store.FeatureTable.check`.
    """
    labels = read_about(folder / "config.toml")["features"]
    if not labels or not warehouse.is_prepared(dataset):
        return
    info = warehouse.info(dataset)
    flags: dict[str, str] = {}
    encoded = set()
    for table in choose_tables(FeatureStore(warehouse), dataset, labels):
        manifest, made = table.manifest(), table.provenance()
        if manifest is None or made is None or made.compute == IMPORTED:
            continue
        inputs = manifest.get("inputs", "")
        if (manifest["items"], inputs) != (info.fingerprint, info.inputs_of(table.modality)):
            level = "" if table.level == "pooled" else f" --level {table.level}"
            flag = f" --{table.modality} {shlex.quote(made.backbone)}"
            flags[level] = flags.get(level, "") + flag
        encoded |= set(table.small_columns(["item_id"])["item_id"].to_pylist())
    if not flags:
        return
    items = load_items(warehouse, dataset, ["item_id"]).column("item_id").to_pylist()
    n_new = len(set(items) - encoded)
    commands = [f"mmrec extract --dataset {dataset}{flag}{level}" for level, flag in flags.items()]
    raise UserError(
        f"{dataset} was prepared after its features were extracted: {n_new:,} of {len(items):,}"
        f" items have none, and others may have changed; run: {' and '.join(commands)}"
        " (what is already encoded is reused)"
    )


def _check_model(folder: Path, spec: RunSpec, recommender: type[Recommender]) -> None:
    """Refuse a model whose weights have rows that only the training's data can number."""
    if spec.is_pretraining:
        raise UserError(
            f"run {folder.name!r} is a pre-training and recommends nothing; start one from it:"
            f" mmrec train --model {spec.model} --init {folder.name}"
        )
    if spec.train.control != NONE:
        raise UserError(
            f"run {folder.name!r} is a control (control={spec.train.control}): the rows of its"
            " features belong to the items of its own preparation; prepare the dataset as it was,"
            " or train again"
        )
    if recommender.user_tables:
        raise UserError(
            f"run {folder.name!r} ({spec.model}) has a vector for each of the users of its own"
            " preparation; prepare the dataset as it was, or train again"
        )


def _with_items(features: ItemFeatures, joint: JointCatalogue) -> ItemFeatures:
    """Return the features of the U items; an item that is not current has none."""
    n_items = len(joint.ids)

    def spread(x_M: Tensor, empty: int = 0) -> Tensor:
        x_U = x_M.new_full((n_items, *x_M.shape[1:]), empty)
        x_U[torch.from_numpy(joint.position_M).to(x_M.device)] = x_M
        return x_U

    return ItemFeatures(
        n_items=n_items,
        vectors={name: spread(x_MD) for name, x_MD in features.vectors.items()},
        present={name: spread(present_M) for name, present_M in features.present.items()},
        tokens={
            name: tokens.renumbered(joint.position_M, n_items)
            for name, tokens in features.tokens.items()
        },
        attributes={name: spread(ids_MP, -1) for name, ids_MP in features.attributes.items()},
    )


def _renumbered(dataset: Dataset, joint: JointCatalogue) -> Dataset:
    """Return a dataset whose items are numbered among the U items."""
    counts_U = np.zeros(len(joint.ids), np.int64)
    counts_U[joint.position_M] = dataset.train_counts
    return replace(
        dataset,
        info=replace(dataset.info, items=len(joint.ids)),
        items=joint.position_M[dataset.items].astype(np.int32),
        train_counts=counts_U,
    )


def _without(dataset: Dataset, first: int) -> Dataset:
    """Return a dataset whose sequences lack the items from ``first`` on."""
    is_kept_I = dataset.items < first
    return replace(
        dataset,
        items=dataset.items[is_kept_I],
        offsets=np.append(0, is_kept_I.cumsum())[dataset.offsets],
        times=None if dataset.times is None else dataset.times[is_kept_I],
    )


def joint_and_later(run: Run) -> tuple[JointCatalogue, Dataset]:
    """Return the joint catalogue and the later interactions of a run of :func:`open_later`."""
    assert run.joint is not None
    assert run.later is not None
    return run.joint, run.later


def readable_histories(run: Run, users: EvalSplit) -> EvalSplit:
    """Return the positions in ``run.data`` of histories of ``run.later``.

    A model of ids reads histories without the new items, so a history can become empty.
    """
    joint, later = joint_and_later(run)
    if later is run.data.dataset:
        return users
    position_I = np.append(0, (later.items < joint.learned).cumsum())
    return EvalSplit(
        users=users.users, starts=position_I[users.starts], targets=position_I[users.targets]
    )


def _load_extended(folder: Path, spec: RunSpec, model: Recommender, joint: JointCatalogue) -> None:
    """Load the best weights; tables of items get rows of zeros for the new items."""
    path = folder / "model.safetensors"
    tensors, document = read_tensors(
        path, f"train it first: mmrec train --resume --run {folder.name}"
    )
    state = model.state_dict()
    prefixes = model.item_tables + model.fitted_buffers
    for name in tensors.keys() & state.keys():
        rows = state[name].shape[:1]
        if prefixes and name.startswith(prefixes) and rows == (len(joint.ids),):
            extended = torch.zeros(state[name].shape, dtype=tensors[name].dtype)
            extended[: joint.learned] = tensors[name]
            tensors[name] = extended
    load_tensors(path, model, tensors, document, _identity(spec, document))


def _identity(spec: RunSpec, document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity of a run whose data may differ in their content from its training's."""
    identity = spec.identity()
    for key in ("dataset", "items", "interactions"):
        identity[key] = document.get(key)
    content = {table["modality"]: table.get("content") for table in document.get("features", [])}
    identity["features"] = [
        {**table, "content": content.get(table["modality"])} for table in identity["features"]
    ]
    return identity
