"""Turn the combinations of a grid into descriptions of runs, with what the command changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from features.errors import UserError, unknown
from features.schema import FEATURE_MODALITIES
from features.store import FeatureStore
from features.warehouse import Warehouse
from trainer.config import TrainConfig
from trainer.models.base import Recommender
from trainer.models.registry import MODELS
from trainer.runs.grid_axes import Combination, Scalar, setting_text
from trainer.runs.settings import pretraining_settings
from trainer.runs.spec import InitialWeights, RunSpec
from trainer.runs.transfer import FULL, check_transfer
from trainer.setting_sources import SettingSources

QUICK: Mapping[str, Scalar] = MappingProxyType(
    {
        "epochs": 1, "batch_size": 256, "monitor_users": 100, "dim": 24,
        "layers": 1, "length": 10, "fusion_layers": 1, "tune_blocks": 0,
        "experts": 2, "codes": 4, "code_bits": 4, "decay_from": 0,
    }
)  # fmt: skip
"""Settings of ``mmrec grid --quick``, which only shows that a grid runs. Numbers of heads divide
the width."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Overrides:
    """What the options of ``mmrec grid`` change in every run of a grid."""

    features: Sequence[str] = ()
    """Feature tables, ``MODALITY[=BACKBONE][:LEVEL]``, that stand for the bare names of modalities
    in the grid, and for the features of runs that name none."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Name to value, set in every run whose model has the setting."""
    quick: bool = False
    """Set :data:`QUICK` where no axis does, and use any feature tables of the dataset."""

    def check(self, combinations: Sequence[Combination]) -> None:
        """Raise a UserError if no run and no pre-training of a grid has one of the settings."""
        names: set[str] = set()
        for combination in combinations:
            names |= _setting_names(MODELS.find(combination.model).load())
            if combination.pretraining is not None:
                recommender = MODELS.find(combination.pretraining.model).load()
                names |= _setting_names(recommender, is_pretraining=True)
        for name in self.settings:
            if name not in names:
                raise unknown("setting", name, sorted(names))


def resolve_combination(
    warehouse: Warehouse, combination: Combination, overrides: Overrides
) -> RunSpec:
    """Describe the run of a combination; nothing is written.

    The description has no initial weights if they come from a pre-training of the grid.

    Raises:
        UserError: The run is not possible.
    """
    recommender = MODELS.find(combination.model).load()
    dataset, _ = warehouse.choose_dataset(combination.dataset)
    init = None
    if combination.pretraining is not None:
        check_transfer(combination.transfer or FULL, recommender)
        if combination.pretraining.model != combination.model:
            raise UserError(
                f"init={combination.init!r} pre-trains {combination.pretraining.model}, whose"
                f" weights have no place in {combination.model}; name a pre-training of it"
            )
    elif combination.init is not None:
        init = InitialWeights(run=combination.init, transfer=combination.transfer or FULL)
    return RunSpec.resolve(
        warehouse,
        combination.model,
        [dataset],
        features=_features(
            warehouse, recommender, [dataset], (combination.features, combination.tables), overrides
        ),
        sources=_sources(
            combination.preset,
            combination.settings,
            overrides,
            _setting_names(recommender),
            combination.varied,
        ),
        init=init,
    )


def resolve_pretraining(
    warehouse: Warehouse, combination: Combination, dataset: str, overrides: Overrides
) -> RunSpec:
    """Describe the pre-training of a combination; nothing is written.

    A model that has no pre-training is trained to recommend on the one dataset.

    Args:
        warehouse: Warehouse with the datasets.
        combination: A combination with a pre-training, which leaves open what the combination
            decides: the dataset and the features.
        dataset: The dataset of the combination.
        overrides: What the command changes.

    Raises:
        UserError: The pre-training is not possible.
    """
    pretraining = combination.pretraining
    assert pretraining is not None
    recommender = MODELS.find(pretraining.model).load()
    datasets = pretraining.datasets or [dataset]
    is_pretraining = recommender.pretraining is not None
    features = pretraining.features or combination.features
    try:
        if len(datasets) > 1 and not is_pretraining:
            raise UserError(
                f"{pretraining.model} is trained on one dataset, not on {', '.join(datasets)};"
                " name one by --source"
            )
        return RunSpec.resolve(
            warehouse,
            pretraining.model,
            datasets,
            is_pretraining=is_pretraining,
            features=_features(
                warehouse, recommender, datasets, (features, combination.tables), overrides
            ),
            sources=_sources(
                pretraining.preset,
                pretraining.settings,
                overrides,
                _setting_names(recommender, is_pretraining=is_pretraining),
                frozenset(),
            ),
        )
    except UserError as error:
        raise UserError(f"pretrain.{pretraining.name}: {error}") from None


def _setting_names(recommender: type[Recommender], *, is_pretraining: bool = False) -> set[str]:
    """Return the settings of a model.

    Those of tuned blocks only if the model reads tokens, a control only if it reads features.
    """
    classes: list[type[Any]] = [TrainConfig, recommender.settings_class]
    task = pretraining_settings(recommender) if is_pretraining else None
    if task is not None:
        classes.append(task)
    names = {entry.name for cls in classes for entry in fields(cls)}
    if not recommender.needs_features:
        names.discard("control")
    return names if recommender.reads_tokens else names - _TUNED


def _sources(
    preset: str | None,
    settings: Mapping[str, Scalar],
    overrides: Overrides,
    known: set[str],
    varied: frozenset[str],
) -> SettingSources:
    """Return the settings of a run; options win over the file, except over its axes.

    Settings of tuned blocks that hold for all runs are left out for models that read no tokens, and
    a control for models that read no features.
    """
    texts = {
        name: setting_text(value)
        for name, value in settings.items()
        if name in known or name in varied or name not in {*_TUNED, "control"}
    }
    if overrides.quick:
        quick = {name: setting_text(value) for name, value in QUICK.items() if name in known}
        texts |= {name: v for name, v in quick.items() if name not in varied or name in _TINY}
    for name, value in overrides.settings.items():
        if name in varied:
            raise UserError(f"--set {name}={value}: {name} is an axis of the grid; leave it out")
        if name in known:
            texts[name] = value
    return SettingSources(preset=preset, pairs=[f"{name}={value}" for name, value in texts.items()])


_TINY = ("epochs", "tune_blocks")  # quick even where an axis sets them
_TUNED = {"tune_blocks", "tune_lr", "tune_weight_decay"}


def _features(
    warehouse: Warehouse,
    recommender: type[Recommender],
    datasets: Sequence[str],
    wanted: tuple[str | None, Mapping[str, str]],
    overrides: Overrides,
) -> list[str] | None:
    """Return the feature tables of a run.

    Args:
        warehouse: Warehouse with the tables.
        recommender: The model.
        datasets: The datasets of the run.
        wanted: The features in the words of the file, and the tables that bare names mean.
        overrides: What the command changes; its tables win over those of the file.
    """
    features, named = wanted
    entries = None if features is None else [entry.strip() for entry in features.split(",")]
    if not recommender.needs_features:
        return entries
    tables_of = {modality: f"{modality}={table}" for modality, table in named.items()}
    given = {} if overrides.quick else tables_of
    given |= {_modality(entry): entry for entry in overrides.features}
    if overrides.quick and entries is not None:
        tables = [FeatureStore(warehouse).tables(dataset) for dataset in datasets]
        present = set.intersection(*({table.modality for table in group} for group in tables))
        asked = dict.fromkeys(map(_modality, entries))
        if "video" in asked and "video" not in present:
            asked["image"] = None
        entries = [name for name in asked if name in present]
        entries = entries or [name for name in ("image", "text") if name in present] or None
    if entries is None:
        return list(given.values()) or None
    return [given.get(entry, entry) for entry in entries]


def _modality(entry: str) -> str:
    name = entry.partition("=")[0].partition(":")[0].strip()
    if name not in FEATURE_MODALITIES:
        raise unknown("modality", name, list(FEATURE_MODALITIES))
    return name
