"""Describe the recommenders: a short list without torch, and all settings of one of them."""

import ast
import inspect
import itertools
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from trainer.models.registry import MODELS

if TYPE_CHECKING:
    from trainer.models.base import Recommender


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSummary:
    """One line of ``mmrec models``."""

    model: str
    summary: str
    origin: str
    """Name and version of the package that brings the recommender; ``mmrec`` for our own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A setting for ``--set``."""

    name: str
    default: Any
    meaning: str
    """The docstring of the field, on one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDescription:
    """The description that ``mmrec models NAME`` prints."""

    model: str
    summary: str
    origin: str
    settings: list[Setting]
    """Settings of the recommender."""
    training: list[Setting]
    """Settings of the training loop, with the defaults that hold for this recommender."""
    pretraining: list[Setting]
    """Settings of ``mmrec pretrain`` alone, and settings whose default differs there."""
    transfers: list[str]
    """Values of ``--transfer``."""
    presets: dict[str, dict[str, Any]]
    """Values of ``--preset`` to the settings that they change; presets of ``mmrec pretrain`` have
    the prefix ``pretrain``."""
    variants: dict[str, str]
    """Ablations and recommended forms to the options that select them."""


def list_models() -> list[ModelSummary]:
    """Return the known recommenders; does not import torch."""
    return [
        ModelSummary(model=name, summary=entry.summary, origin=MODELS.origin(name))
        for name, entry in MODELS.items()
    ]


def broken_models() -> dict[str, str]:
    """Return the recommenders of installed packages that cannot be used, and the reasons."""
    return MODELS.broken


def describe_model(name: str) -> ModelDescription:
    """Return the settings of a recommender; imports torch.

    Raises:
        UserError: No recommender has the name.
    """
    entry = MODELS.find(name)
    from trainer.config import TrainConfig
    from trainer.runs.settings import pretraining_defaults, pretraining_settings

    recommender = entry.load()
    settings = [
        setting
        for setting in _settings(recommender.settings_class)
        if setting.name not in recommender.unread
    ]
    training = _settings(TrainConfig, recommender.train_defaults)
    own = pretraining_settings(recommender)
    known = [*settings, *training, *([] if own is None else _settings(own))]
    meanings = {setting.name: setting.meaning for setting in known}
    return ModelDescription(
        model=name,
        summary=entry.summary,
        origin=MODELS.origin(name),
        settings=settings,
        training=training,
        pretraining=[
            Setting(name=key, default=value, meaning=meanings.get(key, ""))
            for key, value in pretraining_defaults(recommender).items()
        ],
        transfers=["full", *recommender.transfer_groups],
        presets=_presets(recommender),
        variants=dict(recommender.variants),
    )


def _presets(recommender: "type[Recommender]") -> dict[str, dict[str, Any]]:
    presets = {name: dict(settings) for name, settings in recommender.presets.items()}
    if recommender.pretraining is not None:
        for name, settings in recommender.pretraining.presets.items():
            presets[f"pretrain {name}"] = dict(settings)
    return presets


def _settings(config: Any, defaults: Mapping[str, Any] | None = None) -> list[Setting]:
    """Return the settings of a configuration class; ``defaults`` replace those of the class."""
    meanings = _field_docstrings(config)
    values = {field.name: field.default for field in fields(config)} | dict(defaults or {})
    return [
        Setting(name=field.name, default=values[field.name], meaning=meanings.get(field.name, ""))
        for field in fields(config)
    ]


def _field_docstrings(config: Any) -> dict[str, str]:
    """Return the docstring below each field of a class and of its bases."""
    docstrings: dict[str, str] = {}
    for base in reversed(inspect.getmro(config)):
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):  # a class without a source file
            continue
        (tree,) = ast.parse(textwrap.dedent(source)).body
        if isinstance(tree, ast.ClassDef):
            docstrings |= dict(_documented_fields(tree.body))
    return docstrings


def _documented_fields(body: list[ast.stmt]) -> Iterable[tuple[str, str]]:
    for statement, following in itertools.pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            meaning = " ".join(following.value.value.replace("``", "").split())
            yield statement.target.id, meaning
