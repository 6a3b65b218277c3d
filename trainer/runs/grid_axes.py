"""The axes of a grid file, and the combinations of their values.

This module does not import torch.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from features.errors import UserError, unknown

SEED = "seed"
"""The one axis that needs no place in the table: cells are means over it."""
MODALITIES = ("image", "text", "video", "joint")
"""Those of a feature table; :mod:`features.schema` would import pyarrow."""
ABOUT = (
    "model",
    "preset",
    "dataset",
    "features",
    "init",
    "transfer",
    "ranker",
    *MODALITIES,
)
"""Entries of ``[runs]`` that are not settings; an empty text is not given."""
_RESULT = ("run", "split", "targets", "seen", "metric", "value", "low", "high", "users")
"""Columns of the result; an axis cannot be called so."""
_MOST = 10_000
RETRIEVAL = "retrieval"
"""The protocol that evaluates a pre-training by retrieval across modalities."""
RANKERS = ("model", "ridge", "untrained", "features")
"""Rankers of the protocol ``retrieval``: the pre-trained model, ridge regression between the
features, the same model with random weights, and the vectors of the backbones."""

Scalar = str | int | float | bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretraining:
    """A pre-training that combinations start from, in the words of the file."""

    name: str
    model: str
    datasets: list[str]
    """Empty: the dataset of the combination."""
    preset: str | None
    features: str | None
    settings: dict[str, Scalar]


@dataclass(frozen=True, kw_only=True, slots=True)
class Combination:
    """One run of a grid, in the words of the file."""

    keys: dict[str, str]
    """Axis -> its value as text; for an axis of variants, the name of the variant."""
    model: str
    preset: str | None
    dataset: str | None
    features: str | None
    init: str | None
    """The run whose best weights are the initial weights."""
    transfer: str | None
    """Which of these weights; needs ``init``."""
    ranker: str
    """One of :data:`RANKERS`; the protocol ``ranking`` has ``model`` alone."""
    tables: dict[str, str]
    """Modality -> ``BACKBONE[:LEVEL]`` of the feature table that its bare name means."""
    settings: dict[str, Scalar]
    varied: frozenset[str] = frozenset()
    """Names that an axis sets."""
    pretraining: Pretraining | None = None
    """The pre-training that ``init`` names."""

    @property
    def label(self) -> str:
        """All axes with their values, on one line."""
        return ", ".join(f"{key}={value}" for key, value in self.keys.items()) or self.model


def read_pretrainings(tables: Any) -> dict[str, Pretraining]:
    """Return name -> pre-training.

    Args:
        tables: The table ``pretrain`` of the file.

    Raises:
        UserError: A description is wrong.
    """
    if not isinstance(tables, dict):
        raise UserError(f"pretrain={tables!r} must be tables [pretrain.NAME]")
    pretrainings = {}
    for name, table in tables.items():
        where = f"pretrain.{name}"
        if not isinstance(table, dict):
            raise UserError(f"{where}={table!r} must be a table")
        values = dict(table)
        datasets = values.pop("datasets", [])
        if not isinstance(datasets, list) or not all(isinstance(entry, str) for entry in datasets):
            raise UserError(f"{where}.datasets={datasets!r} must be a list of names")
        values = {key: _scalar(f"{where}.{key}", value) for key, value in values.items()}
        about = {key: values.pop(key, None) for key in ("model", "preset", "features")}
        for key, value in about.items():
            if value is not None and not isinstance(value, str):
                raise UserError(f"{where}.{key}={value!r} must be text")
        if not about["model"]:
            raise UserError(f"{where} sets no model; give one that mmrec pretrain takes")
        pretrainings[name] = Pretraining(
            name=name,
            model=str(about["model"]),
            datasets=datasets,
            preset=_text(about["preset"]),
            features=_text(about["features"]),
            settings=values,
        )
    return pretrainings


def _text(value: Scalar | None) -> str | None:
    return str(value) if value else None


def runs_table(document: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """Return the table ``[runs]`` of a file of a grid or of a search.

    Args:
        document: The content of the file.
        known: The keys that it can have.

    Raises:
        UserError: A key is unknown, or there is no table.
    """
    for key in document:
        if key not in known:
            raise unknown("key", key, [*known, "... in [runs]"])
    runs = document.get("runs")
    if not isinstance(runs, dict) or not runs:
        raise UserError("there is no table [runs]; it holds model, dataset, features and settings")
    return runs


def read_axes(runs: dict[str, Any]) -> dict[str, dict[str, dict[str, Scalar]]]:
    """Return axis -> value as text -> the settings of the value, in the order of the file.

    Args:
        runs: The table ``[runs]``.

    Raises:
        UserError: An axis is empty, names a value twice, or sets what another axis sets.
    """
    axes: dict[str, dict[str, dict[str, Scalar]]] = {}
    setters: dict[str, str] = {}
    for key, value in runs.items():
        if isinstance(value, list):
            values = {setting_text(entry) or "-": {key: _scalar(key, entry)} for entry in value}
            if len(values) < len(value):
                raise UserError(f"{key} has one value twice")
        elif isinstance(value, dict):
            values = {name: _variant(key, name, sets) for name, sets in value.items()}
        else:
            _scalar(key, value)
            continue
        if not values:
            raise UserError(f"{key} is empty; give it a value, or leave it out")
        if key in _RESULT:
            raise UserError(f"an axis cannot be called {key!r}: so is a column of the result")
        axes[key] = values
        for name in {name for sets in values.values() for name in sets}:
            if name in setters:
                raise UserError(f"{name} is set by {setters[name]} and by {key}; set it by one")
            setters[name] = key
    return axes


def _variant(key: str, name: str, sets: Any) -> dict[str, Scalar]:
    if not isinstance(sets, dict):
        raise UserError(f"{key}.{name}={sets!r} must be a table of settings")
    return {inner: _scalar(f"{key}.{name}.{inner}", value) for inner, value in sets.items()}


def _scalar(key: str, value: Any) -> Scalar:
    if not isinstance(value, str | int | float | bool):
        raise UserError(f"{key}={value!r} must be text, a number, true or false")
    return value


def setting_text(value: Scalar) -> str:
    """Return a value as ``--set`` takes it and as tables show it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def cross_axes(
    fixed: Mapping[str, Scalar],
    axes: Mapping[str, Mapping[str, Mapping[str, Scalar]]],
    pretrainings: Mapping[str, Pretraining],
    protocol: str,
) -> list[Combination]:
    """Return the combinations of the values of all axes.

    Args:
        fixed: Entries of ``[runs]`` that are the same in all combinations.
        axes: Axis -> value as text -> the entries that the value sets, from :func:`read_axes`.
        pretrainings: Name -> pre-training.
        protocol: Protocol of the grid.

    Raises:
        UserError: There are too many combinations, or the entries of one contradict each other.
    """
    count = int(np.prod([len(values) for values in axes.values()], dtype=object))
    if count > _MOST:
        raise UserError(f"the grid has {count} combinations; give at most {_MOST}")
    varied = frozenset(
        name for values in axes.values() for sets in values.values() for name in sets
    )
    combinations = []
    for names in itertools.product(*axes.values()):
        keys = dict(zip(axes, names, strict=True))
        values = dict(fixed)
        for key, name in keys.items():
            values.update(axes[key][name])
        about: dict[str, str | None] = {}
        for name in ABOUT:
            value = values.pop(name, None)
            if value is not None and not isinstance(value, str):
                raise UserError(f"{name}={value!r} must be text")
            about[name] = value or None
        combination = _combination(keys, about, values, varied, pretrainings)
        _check_combination(combination, protocol, about["ranker"])
        combinations.append(combination)
    return combinations


def _combination(
    keys: dict[str, str],
    about: Mapping[str, str | None],
    settings: dict[str, Scalar],
    varied: frozenset[str],
    pretrainings: Mapping[str, Pretraining],
) -> Combination:
    if about["model"] is None:
        raise UserError("[runs] sets no model; give one, see mmrec models")
    return Combination(
        keys=keys,
        model=about["model"],
        preset=about["preset"],
        dataset=about["dataset"],
        features=about["features"],
        init=about["init"],
        transfer=about["transfer"],
        ranker=about["ranker"] or RANKERS[0],
        tables={name: table for name in MODALITIES if (table := about[name])},
        settings=settings,
        varied=varied,
        pretraining=pretrainings.get(about["init"] or ""),
    )


def _check_combination(combination: Combination, protocol: str, ranker: str | None) -> None:
    """Raise a UserError if the entries of a combination contradict each other."""
    place = f" ({combination.label} has none)" if combination.keys else ""
    if combination.transfer is not None and combination.init is None:
        raise UserError(
            f"transfer={combination.transfer!r} takes weights of a run; name it by init{place}"
        )
    if protocol == RETRIEVAL and combination.pretraining is None:
        raise UserError(f"protocol='retrieval' evaluates a pre-training; name it by init{place}")
    if combination.ranker not in RANKERS:
        raise unknown("ranker", combination.ranker, list(RANKERS))
    if protocol != RETRIEVAL and ranker is not None:
        raise UserError(f"ranker={ranker!r} goes with protocol='retrieval'; leave it out")
