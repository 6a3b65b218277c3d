"""The settings of a run: defaults of the model and of its stage, a preset, a file and pairs."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, fields, replace
from types import MappingProxyType
from typing import Any

from features.dataset import load_dataset
from features.errors import UserError, unknown
from features.warehouse import Warehouse
from trainer.config import AUTO, Settings, TrainConfig
from trainer.data.control import NONE, Control
from trainer.data.multi_dataset import AttributeColumns
from trainer.evaluation.encode import repeated_share
from trainer.losses.base import LossSettings
from trainer.models.base import Recommender
from trainer.models.registry import names_of
from trainer.modules.attributes import AttributeSettings
from trainer.setting_sources import SettingSources, build_settings
from trainer.tasks.registry import NEXT_ITEM, TASKS

EXACT_ITEMS = 50_000
"""Most items of a catalogue for which ``auto`` selects the exact softmax and updates of all
items."""
CANDIDATES = 4096
"""Items in the softmax of a step that ``auto`` selects for larger catalogues."""

_MOST_REPEATED = 0.01
"""Largest share of repeated validation targets with which early stopping filters seen items."""


def pretraining_settings(recommender: type[Recommender]) -> type[Settings] | None:
    """Return the settings class of the model's pre-training task; ``None`` without settings."""
    if recommender.pretraining is None:
        return None
    return TASKS.find(recommender.pretraining.task).settings_class


def pretraining_defaults(recommender: type[Recommender]) -> dict[str, Any]:
    """Return the settings that ``mmrec pretrain`` changes or adds, with their defaults."""
    if recommender.pretraining is None:
        return {}
    settings_class = pretraining_settings(recommender)
    own = {} if settings_class is None else asdict(settings_class())
    return {**recommender.pretraining.settings, **own}


def attribute_columns(settings: Settings) -> AttributeColumns:
    """Return the columns of attributes that a model with these settings reads."""
    if isinstance(settings, AttributeSettings):
        return settings.attribute_columns
    return AttributeColumns()


def preset_settings(
    recommender: type[Recommender], preset: str | None, is_pretraining: bool
) -> Mapping[str, Any]:
    """Return the settings of a preset, empty without a preset.

    Raises:
        UserError: The model has no such preset.
    """
    if preset is None:
        return {}
    presets = recommender.presets
    if is_pretraining:
        assert recommender.pretraining is not None
        presets = recommender.pretraining.presets
    if preset not in presets:
        raise unknown("preset", preset, list(presets))
    return presets[preset]


def task_name(recommender: type[Recommender], is_pretraining: bool) -> str:
    """Return the task of a stage, a name in :data:`trainer.tasks.registry.TASKS`."""
    if not is_pretraining:
        return NEXT_ITEM
    assert recommender.pretraining is not None
    return recommender.pretraining.task


def resolve_settings(
    recommender: type[Recommender],
    is_pretraining: bool,
    sources: SettingSources,
    changed_defaults: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Any, ...]:
    """Create the settings of the loop, of the model and, if the task has any, of the task.

    Raises:
        UserError: A setting is unknown, has a wrong value, or is given by a pair although the model
            does not read it.
    """
    for name in recommender.unread:
        if name in sources.parsed_pairs():
            raise UserError(
                f"{recommender.__name__} does not read {name!r}; leave --set {name} out"
            )
    defaults = stage_defaults(recommender, is_pretraining, changed_defaults)
    defaults |= preset_settings(recommender, sources.preset, is_pretraining)
    return build_settings(settings_classes(recommender, is_pretraining), sources, defaults)


def settings_classes(recommender: type[Recommender], is_pretraining: bool) -> list[type[Any]]:
    """Return the classes of the settings of the loop, of the model and of the task, if any."""
    task_class = TASKS.find(task_name(recommender, is_pretraining)).settings_class
    classes: list[type[Any]] = [TrainConfig, recommender.settings_class]
    return classes if task_class is None else [*classes, task_class]


def stage_defaults(
    recommender: type[Recommender],
    is_pretraining: bool,
    changed_defaults: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return the defaults of the model and of its stage that are not those of the classes.

    Args:
        recommender: The model.
        is_pretraining: The stage.
        changed_defaults: Further defaults, of any model; those of other models are left out.
    """
    names = {x.name for kind in settings_classes(recommender, is_pretraining) for x in fields(kind)}
    own = {name: value for name, value in changed_defaults.items() if name in names}
    defaults = {**recommender.train_defaults, **own}
    if is_pretraining:
        assert recommender.pretraining is not None
        defaults |= recommender.pretraining.settings
    return defaults


def resolve_automatic(
    train: TrainConfig, settings: Any, n_items: int
) -> tuple[TrainConfig, Any, frozenset[str]]:
    """Replace the value ``auto`` by what the number of items determines.

    Up to :data:`EXACT_ITEMS` items, a softmax is over all items, and a step changes all learned
    item vectors. Above, a softmax is over :data:`CANDIDATES` items, and a step changes the vectors
    that it reads. The memory of the machine plays no part.

    Returns:
        The settings of the loop and of the model, and the names of the replaced settings.
    """
    is_large = n_items > EXACT_ITEMS
    replaced = set()
    if train.item_updates == AUTO:
        train = replace(train, item_updates="rows" if is_large else "all")
        replaced.add("item_updates")
    if isinstance(settings, LossSettings) and settings.candidates == AUTO:
        is_softmax = getattr(settings, "loss", "softmax") == "softmax"
        settings = replace(settings, candidates=CANDIDATES if is_large and is_softmax else 0)
        replaced.add("candidates")
    return train, settings, frozenset(replaced)


def monitored_ranking(warehouse: Warehouse, dataset: str) -> str:
    """Return ``kept`` if more than 1% of the validation targets are repeated, else ``filtered``.

    The filtered ranking counts repeated targets as misses, so it says little about such data.
    """
    share = repeated_share(load_dataset(warehouse, dataset), "validation")
    return "kept" if share > _MOST_REPEATED else "filtered"


def changed_settings(
    recommender: type[Recommender],
    is_pretraining: bool,
    given: Mapping[str, Mapping[str, Any]],
    automatic: Set[str] = frozenset(),
) -> list[str]:
    """Return the settings that are not the model's defaults, as ``NAME=VALUE``.

    Args:
        recommender: The model.
        is_pretraining: Compare with the defaults of the pre-training.
        given: The tables of settings of :func:`trainer.config.settings_tables`.
        automatic: Settings whose value ``auto`` was replaced.
    """
    # Defaults alone need not be valid: the pre-training of s3rec has no default of `attributes`.
    classes = settings_classes(recommender, is_pretraining)
    defaults = {entry.name: entry.default for kind in classes for entry in fields(kind)}
    defaults |= stage_defaults(recommender, is_pretraining)
    return [
        f"{name}={str(value).lower() if isinstance(value, bool) else value}"
        for values in given.values()
        for name, value in values.items()
        if value != defaults[name] and name not in automatic
    ]


def given_weights_settings(recommender: type[Recommender], settings: Settings) -> list[str]:
    """Return the settings that are true and need initial weights from another run."""
    return [name for name in recommender.of_given_weights if getattr(settings, name)]


def check_pretrains(name: str, recommender: type[Recommender]) -> None:
    """Raise a UserError unless the model has a pre-training."""
    if recommender.pretraining is None:
        able = ", ".join(names_of(lambda model: model.pretraining is not None))
        raise UserError(f"{name} has no pre-training; known: {able}")


def check_control(control: str, name: str, labels: Sequence[str]) -> None:
    """Raise a UserError if a control is set that cannot change the features of a run.

    Args:
        control: Value of the setting ``control``.
        name: Name of the model.
        labels: Labels of the feature tables of the run.
    """
    if control == NONE:
        return
    if not labels:
        raise UserError(
            f"control={control} changes feature tables, and {name} reads none here; leave it out"
        )
    for label in labels:
        if ":" in label:
            Control(kind=control).check_tokens(label)


def check_prior(
    prior: str, name: str, recommender: type[Recommender], *, is_pretraining: bool
) -> None:
    """Raise a UserError if a prior is set and cannot be added to the scores of the model."""
    if prior == "none":
        return
    reason = ""
    if is_pretraining:
        reason = "a pre-training recommends nothing"
    elif not (recommender.has_vectors and issubclass(recommender.settings_class, LossSettings)):
        reason = f"the scores of {name} are not the inner products of a trained model"
    if reason:
        raise UserError(f"prior={prior} cannot be added: {reason}; leave it out")
