"""The description of a run: model, datasets, feature tables, settings and initial weights.

A description is created once, from a command or from a run's folder. Training, resuming,
evaluation, transfer and grids receive it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from features.errors import UserError
from features.store import FeatureTable
from features.warehouse import Warehouse
from trainer.config import Settings, TrainConfig
from trainer.data.control import Control
from trainer.data.multi_dataset import (
    AttributeColumns,
    DataIdentity,
    choose_common_tables,
    identify_data,
)
from trainer.models.base import Recommender
from trainer.models.registry import MODELS, names_of
from trainer.runs.folder import FORMAT, check_format, read_about
from trainer.runs.read import read_record
from trainer.runs.settings import (
    attribute_columns,
    changed_settings,
    check_control,
    check_pretrains,
    check_prior,
    given_weights_settings,
    monitored_ranking,
    preset_settings,
    resolve_automatic,
    resolve_settings,
    task_name,
)
from trainer.runs.transfer import FULL, check_source, check_transfer, hash_tensors, read_source
from trainer.setting_sources import SettingSources, settings_tables
from trainer.tasks.registry import NEXT_ITEM

OF_EARLIER_RUNS = {"monitor_users": 0, "item_updates": "all", "centre": False}
"""Values of settings that a run's ``config.toml`` does not name, where the default is not what the
version did that wrote it."""

PRETRAIN = "pretrain"
"""Value of ``stage`` in the configuration of a pre-training."""


class PreparationError(UserError):
    """The data of a run have been prepared anew since its training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InitialWeights:
    """The run whose best weights are the initial weights."""

    run: str
    transfer: str = FULL
    """Name of the transfer, which selects the weights to copy; see
    :func:`trainer.runs.transfer.copy_weights`."""
    weights: str = ""
    """Hash of the weights of that run; empty until they are read."""

    def document(self) -> dict[str, str]:
        """Return the fields in the form that ``config.toml`` and checkpoints store."""
        return {"run": self.run, "transfer": self.transfer, "weights": self.weights}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSpec:
    """The description of a run: all inputs that determine its result.

    Two runs with equal identities give equal weights on one machine with the same number of
    threads.

    Examples:
        >>> warehouse = Warehouse("warehouse")                        # doctest: +SKIP
        >>> spec = RunSpec.resolve(
        ...     warehouse, "sasrec", ["demo"], sources=SettingSources(pairs=["dim=32"])
        ... )                                                         # doctest: +SKIP
        >>> run = create_run(warehouse, spec)                         # doctest: +SKIP
        >>> train_run(run)                                            # doctest: +SKIP
    """

    model: str
    """Name in :data:`trainer.models.registry.MODELS`."""
    datasets: tuple[str, ...]
    """Prepared datasets; several only for a pre-training."""
    features: tuple[str, ...]
    """Labels ``modality=backbone[:level]`` of the feature tables, at most one per modality."""
    is_pretraining: bool
    """True for ``mmrec pretrain``. A pre-trained run gives no recommendations."""
    train: TrainConfig
    """Settings of the training loop."""
    settings: Settings
    """Settings of the model."""
    task_settings: Settings | None
    """Settings of the task; ``None`` if it has none."""
    data: DataIdentity
    """Hashes of the datasets and feature tables."""
    init: InitialWeights | None = None
    """The run whose weights are the initial weights; ``None``: random weights."""
    automatic: frozenset[str] = frozenset()
    """Settings whose value ``auto`` the number of items has replaced."""
    younger: frozenset[str] = frozenset()
    """Settings that the run's ``config.toml`` does not name: a later version added them. They have
    the values that repeat what the run's version did, and its checkpoints do not name them."""

    @classmethod
    def resolve(
        cls,
        warehouse: Warehouse,
        model: str,
        datasets: Sequence[str],
        *,
        is_pretraining: bool = False,
        features: Sequence[str] | None = None,
        sources: SettingSources | None = None,
        init: InitialWeights | None = None,
    ) -> Self:
        """Create a description from the arguments of a command. Nothing is written.

        Args:
            warehouse: Warehouse with the datasets, feature tables and runs.
            model: Name of the model.
            datasets: Names of prepared datasets.
            is_pretraining: Pre-train instead of training for recommendation.
            features: Feature tables, see :func:`trainer.data.feature_tables.choose_tables`; an
                entry may name several, separated by commas. ``None``: the only table of each
                modality.
            sources: The settings that differ from the defaults.
            init: The run whose weights are the initial weights.

        Raises:
            UserError: A name or a setting is unknown, or the arguments contradict each other.
        """
        recommender = MODELS.find(model).load()
        if is_pretraining:
            check_pretrains(model, recommender)
        for name in datasets:
            warehouse.info(name)
            if list(datasets).count(name) > 1:
                raise UserError(f"--dataset names {name!r} twice; name it once")
        sources = sources or SettingSources()
        train, settings, *task_settings = resolve_settings(recommender, is_pretraining, sources)
        given = {*sources.names(), *preset_settings(recommender, sources.preset, is_pretraining)}
        if not is_pretraining and "monitor_seen" not in given:
            train = replace(train, monitor_seen=monitored_ranking(warehouse, datasets[0]))
        n_items = sum(warehouse.info(name).items for name in datasets)
        train, settings, automatic = resolve_automatic(train, settings, n_items)
        check_prior(train.prior, model, recommender, is_pretraining=is_pretraining)
        tables = _choose_tables(warehouse, (model, recommender), datasets, features, train)
        labels = [table.label for table in tables]
        check_control(train.control, model, labels)
        spec = cls(
            model=model,
            datasets=tuple(datasets),
            features=tuple(labels),
            is_pretraining=is_pretraining,
            train=train,
            settings=settings,
            task_settings=task_settings[0] if task_settings else None,
            data=identify_data(warehouse, datasets, labels, attribute_columns(settings)),
            automatic=automatic,
        )
        return spec if init is None else spec.with_init(warehouse, init)

    def with_init(self, warehouse: Warehouse, init: InitialWeights) -> Self:
        """Return the description with initial weights.

        Raises:
            UserError: There is no such run, it is of another model, its weights have changed, or
                it has learned interactions that ``hold_out_cold`` holds out.
        """
        if self.train.hold_out_cold:
            _check_held_out(warehouse, init.run, self.datasets)
        return replace(self, init=_read_init(warehouse, self, init))

    def check_given_weights(self) -> None:
        """Raise a UserError if a setting needs initial weights and there are none."""
        recommender = MODELS.find(self.model).load()
        if self.init is None and (names := given_weights_settings(recommender, self.settings)):
            raise UserError(
                f"{names[0]}=true is for the weights of another run, and {self.model} starts from"
                f" random ones; name a run by --init, or leave {names[0]}=true out"
            )

    @classmethod
    def read(cls, warehouse: Warehouse, folder: Path, *, dataset: str | None = None) -> Self:
        """Read the description of a run from its folder.

        Args:
            warehouse: Warehouse with the run's datasets and feature tables.
            folder: Folder of the run.
            dataset: Dataset that the run is used on, in place of its own; its preparation may be
                another one.

        Raises:
            UserError: The folder is damaged, was written by another version of mmrec, or the
                dataset has been prepared again since.
        """
        path = folder / "config.toml"
        about = read_about(path)
        check_format(folder, about)
        model, datasets = about["model"], about.get("sources", [about["dataset"]])
        if dataset is not None:
            datasets = [dataset]
        is_pretraining = about.get("stage") == PRETRAIN
        try:
            recommender = MODELS.find(model).load()
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        sources = SettingSources(file=path)
        train, settings, *task_settings = resolve_settings(
            recommender, is_pretraining, sources, OF_EARLIER_RUNS
        )
        tables = settings_tables(train, settings, *task_settings)
        data = identify_data(warehouse, datasets, about["features"], attribute_columns(settings))
        if dataset is None:
            _check_preparation(folder, about, data)
        return cls(
            model=model,
            datasets=tuple(datasets),
            features=tuple(about["features"]),
            is_pretraining=is_pretraining,
            train=train,
            settings=settings,
            task_settings=task_settings[0] if task_settings else None,
            data=data,
            init=InitialWeights(**about["init"]) if "init" in about else None,
            younger=frozenset().union(*tables.values()) - sources.names(),
        )

    @property
    def dataset(self) -> str:
        """Names of the datasets, joined by ``+``."""
        return "+".join(self.datasets)

    @property
    def attributes(self) -> AttributeColumns:
        """Columns of the items that the model reads as attributes."""
        return attribute_columns(self.settings)

    @property
    def control(self) -> Control:
        """The treatment of the rows of the feature tables."""
        return Control(kind=self.train.control, seed=self.train.seed)

    @property
    def task(self) -> str:
        """Name of the task in :data:`trainer.tasks.registry.TASKS`."""
        return task_name(MODELS.find(self.model).load(), self.is_pretraining)

    def identity(self) -> dict[str, Any]:
        """Return all inputs that determine the result, as a JSON document for checkpoints."""
        document: dict[str, Any] = {
            "recommender": self.model,
            "dataset": self.dataset,
            "items": self.data.items,
            "interactions": self.data.interactions,
            "features": [dict(table) for table in self.data.features],
        }
        tables = settings_tables(self.train, self.settings, self.task_settings)
        for values in tables.values():
            for name in self.younger & values.keys():
                del values[name]
        assert not document.keys() & tables.keys(), "a settings table and an entry share a key"
        document |= tables
        return document if self.init is None else document | {"init": self.init.document()}

    def digest(self) -> str:
        """Return 12 hexadecimal digits of a hash of the identity.

        The names of the datasets are left out: equal data under two names give one digest.
        """
        document = self.identity()
        del document["dataset"]
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:12]

    def document(self) -> dict[str, Any]:
        """Return the content of ``config.toml``, without the entries that ``create_run`` adds."""
        about: dict[str, Any] = {
            "format": FORMAT,
            "model": self.model,
            "dataset": self.dataset,
            "features": list(self.features),
            "fingerprint": self.data.items,
            "interactions": self.data.interactions,
            "tied": self.data.tied,
            "ties": self.data.ties,
        }
        if self.is_pretraining:
            about["stage"] = PRETRAIN
        if len(self.datasets) > 1:
            about["sources"] = list(self.datasets)
        if self.init is not None:
            about["init"] = self.init.document()
        tables = settings_tables(self.train, self.settings, self.task_settings)
        recommender = MODELS.find(self.model).load()
        about["changed"] = changed_settings(
            recommender, self.is_pretraining, tables, self.automatic
        )
        return {"run": about, **tables}


def _check_preparation(folder: Path, about: Mapping[str, Any], data: DataIdentity) -> None:
    """Refuse data other than those that a run was created with.

    Runs of earlier versions name no interactions; their checkpoints do.
    """
    ties = about.get("ties", data.ties)
    order = f" (ties ordered by {ties}, now by {data.ties})" if ties != data.ties else ""
    if (data.items, data.interactions) != (
        about["fingerprint"],
        about.get("interactions", data.interactions),
    ):
        raise PreparationError(
            f"run {folder.name!r} was trained on another preparation of"
            f" {about['dataset']!r}{order}; prepare it as it was, or train again"
        )


def _choose_tables(
    warehouse: Warehouse,
    model: tuple[str, type[Recommender]],
    datasets: Sequence[str],
    features: Sequence[str] | None,
    train: TrainConfig,
) -> list[FeatureTable]:
    """Choose the feature tables, and check that the model can read them."""
    name, recommender = model
    if train.tune_blocks and not recommender.reads_tokens:
        able = ", ".join(names_of(lambda model: model.reads_tokens))
        raise UserError(
            f"tune_blocks={train.tune_blocks} is for models that read tokens ({able}), not {name};"
            " leave it out"
        )
    if not recommender.needs_features:
        if features:
            raise UserError(
                f"{name} learns from item ids alone; leave --features {','.join(features)} out"
            )
        return []
    labels = None
    if features is not None:
        labels = [part.strip() for entry in features for part in entry.split(",")]
    tables = choose_common_tables(warehouse, datasets, labels, layers=bool(train.tune_blocks))
    for table in tables:
        if table.level != "pooled" and not recommender.reads_tokens:
            raise UserError(
                f"{name} reads pooled vectors, not {table.label}; name a pooled table by --features"
            )
    return tables


def _check_held_out(warehouse: Warehouse, name: str, datasets: Sequence[str]) -> None:
    """Refuse initial weights that have learned interactions with cold items of the datasets.

    The runs that these weights themselves started from are checked as well, as far as they exist.
    Alignment of texts and images learns no interactions.
    """
    seen: set[str] = set()
    while name and name not in seen and name in warehouse.runs():
        seen.add(name)
        record = read_record(warehouse, name)
        sources = record.about.get("sources", [record.about["dataset"]])
        shared = sorted(set(datasets) & set(sources))
        task = task_name(MODELS.find(record.about["model"]).load(), record.pretraining)
        learns = task == NEXT_ITEM and not record.settings.get("hold_out_cold")
        if shared and learns:
            raise UserError(
                f"hold_out_cold=true: the initial weights of run {name!r} have learned the"
                f" interactions with cold items of {shared[0]}; train {name} with"
                " hold_out_cold=true, or leave it out"
            )
        name = record.about.get("init", {}).get("run", "")


def _read_init(warehouse: Warehouse, spec: RunSpec, init: InitialWeights) -> InitialWeights:
    """Hash the initial weights, and check that their run has the same model."""
    check_transfer(init.transfer, MODELS.find(spec.model).load())
    folder, _ = warehouse.choose_run(init.run)
    check_source(folder, spec.model)
    digest = hash_tensors(read_source(folder)[0])
    if init.weights not in ("", digest):
        raise UserError(
            f"the weights of run {init.run!r} have changed, because it is being trained; wait for"
            " its end and try again"
        )
    return replace(init, weights=digest)
