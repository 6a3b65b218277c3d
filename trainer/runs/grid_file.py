"""A grid: a TOML file whose lists are crossed into combinations, each of them one run.

``[runs]`` holds ``model``, ``preset``, ``dataset``, ``features``, ``init``, ``transfer`` and
settings. A list is an axis; a table is an axis of named variants, each of which sets some of these.
``[pretrain.NAME]`` describes a pre-training, and ``init = "NAME"`` starts from it. Published tables
in this form are recipes, see :mod:`trainer.runs.recipes`.
This module does not import torch: a bad file is refused before torch is loaded.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from features.documents import read_user_toml
from features.errors import UserError, unknown
from retrieval.list_metrics import LIST_METRICS
from retrieval.metrics import METRIC_NAMES

SEED = "seed"
"""The one axis that needs no place in the table: cells are means over it."""
SPLITS = ("validation", "test")
SEEN = ("filtered", "kept")
_ABOUT = (
    "model",
    "preset",
    "dataset",
    "features",
    "init",
    "transfer",
)  # not settings; "": not given
METRIC = "metric"
"""In ``rows``: the metrics are rows, as in many published tables; otherwise they are columns."""
TARGETS = ("all", "new", "repeated", "cold")
_LISTS = ("rows", "columns", "metrics")
_TEXTS = ("title", "departs")
_TOP = (*_LISTS, *_TEXTS, "split", "seen", "targets", "pretrain", "runs")
_RESULT = ("run", "split", "targets", "seen", "metric", "value", "low", "high", "users")
"""Columns of the result; an axis cannot be called so."""
_DEFAULTS = {"split": "test", "seen": "filtered", "targets": "all"}
_MOST = 10_000

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
    settings: dict[str, Scalar]
    varied: frozenset[str] = frozenset()
    """Names that an axis sets."""
    pretraining: Pretraining | None = None
    """The pre-training that ``init`` names."""

    @property
    def label(self) -> str:
        """All axes with their values, on one line."""
        return ", ".join(f"{key}={value}" for key, value in self.keys.items()) or self.model


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """The combinations of a grid file, and the layout of its table of results."""

    path: Path
    rows: list[str]
    columns: list[str]
    metrics: list[str]
    split: str
    seen: str
    targets: str
    """Subset of the targets: ``all``, ``new``, ``repeated`` or ``cold``."""
    metric_rows: bool
    """True: each metric is a row; False: each metric is a column."""
    title: str
    departs: str
    """How the table differs from the published one; empty if it does not, or if there is none."""
    combinations: list[Combination]


def read_grid(path: Path) -> Grid:
    """Read and cross a grid.

    Raises:
        UserError: One line that names the file, what is wrong in it, and what could stand there.
    """
    return parse_grid(path, read_user_toml(path))


def parse_grid(path: Path, document: dict[str, Any]) -> Grid:
    """Cross the document of a grid file.

    Args:
        path: The file, or the name of a recipe, for messages.
        document: The content; see the module.

    Raises:
        UserError: One line that names the file, what is wrong in it, and what could stand there.
    """
    try:
        return _grid(path, document)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _grid(path: Path, document: dict[str, Any]) -> Grid:
    for key in document:
        if key not in _TOP:
            raise unknown("key", key, [*_TOP, "... in [runs]"])
    runs = document.get("runs")
    if not isinstance(runs, dict) or not runs:
        raise UserError("there is no table [runs]; it holds model, dataset, features and settings")
    for key in _LISTS:
        entries = document.get(key, [])
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise UserError(f"{key}={entries!r} must be a list of names")
    for key in _TEXTS:
        if not isinstance(document.get(key, ""), str):
            raise UserError(f"{key}={document[key]!r} must be text")
    axes = _axes(runs)
    rows, columns = _placed(document, axes)
    metrics = document.get("metrics", ["HR@10", "NDCG@10"])
    if not metrics:
        raise UserError("metrics=[] leaves the table empty; name one, or leave the key out")
    for metric in metrics:
        if metric not in (known := (*METRIC_NAMES, *LIST_METRICS)):
            raise unknown("metric", metric, list(known))
    choices = {}
    for name, options in (("split", SPLITS), ("seen", SEEN), ("targets", TARGETS)):
        choices[name] = document.get(name, _DEFAULTS[name])
        if choices[name] not in options:
            raise unknown(name, str(choices[name]), list(options))
    if choices["targets"] == "repeated" and choices["seen"] == "filtered":
        raise UserError("targets='repeated' are all missed with seen='filtered'; give seen='kept'")
    if choices["targets"] != "all" and (lists := [m for m in metrics if m in LIST_METRICS]):
        raise UserError(f"{lists[0]} describes the lists of all users; leave targets out")
    fixed = {key: value for key, value in runs.items() if key not in axes}
    return Grid(
        path=path,
        rows=[key for key in rows if key != METRIC],
        columns=columns,
        metrics=metrics,
        **choices,
        metric_rows=METRIC in rows,
        title=document.get("title", ""),
        departs=document.get("departs", ""),
        combinations=_cross(fixed, axes, _pretrainings(document.get("pretrain", {}))),
    )


def _placed(document: dict[str, Any], axes: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the axes of the rows, and those of the columns."""
    columns = document.get("columns", ["dataset"] if "dataset" in axes else [])
    rows = document.get("rows", [key for key in axes if key not in (*columns, SEED)])
    for name, chosen in (("rows", rows), ("columns", columns)):
        for key in chosen:
            if key not in axes and not (key == METRIC and name == "rows"):
                raise UserError(
                    f"{name} names {key!r}, which is not a list or table in [runs];"
                    f" there are: {', '.join(axes) or 'none'}"
                )
    if METRIC in rows[:-1]:
        raise UserError(f"rows={rows} must name {METRIC!r} last")
    placed = [*rows, *columns]
    for key in axes:
        if placed.count(key) != 1 and (key != SEED or key in placed):
            place = "neither in rows nor in columns" if key not in placed else "twice"
            raise UserError(f"the axis {key!r} is named {place}; name it once in rows or columns")
    return rows, columns


def _pretrainings(tables: Any) -> dict[str, Pretraining]:
    """Return name -> pre-training."""
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


def _axes(runs: dict[str, Any]) -> dict[str, dict[str, dict[str, Scalar]]]:
    """Return axis -> value as text -> the settings of the value, in the order of the file."""
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


def _cross(
    fixed: Mapping[str, Scalar],
    axes: Mapping[str, Mapping[str, Mapping[str, Scalar]]],
    pretrainings: Mapping[str, Pretraining],
) -> list[Combination]:
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
        for name in _ABOUT:
            value = values.pop(name, None)
            if value is not None and not isinstance(value, str):
                raise UserError(f"{name}={value!r} must be text")
            about[name] = value or None
        if about["model"] is None:
            raise UserError("[runs] sets no model; give one, see mmrec models")
        if about["transfer"] is not None and about["init"] is None:
            where = ", ".join(f"{key}={name}" for key, name in keys.items())
            raise UserError(
                f"transfer={about['transfer']!r} takes weights of a run; name it by init"
                + (f" ({where} has none)" if where else "")
            )
        combinations.append(
            Combination(
                keys=keys,
                model=about["model"],
                preset=about["preset"],
                dataset=about["dataset"],
                features=about["features"],
                init=about["init"],
                transfer=about["transfer"],
                settings=values,
                varied=varied,
                pretraining=pretrainings.get(about["init"] or ""),
            )
        )
    return combinations


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One figure of the table: the mean over seeds."""

    value: float
    spread: float | None
    """Standard deviation over seeds; ``None`` for a single seed."""
    best: bool
    """True if no other row has a higher value in this column, or no other column in this row where
    metrics are rows; False for metrics of the recommended items, of which more is not always
    better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pivot:
    """The table of a grid: rows x (columns x metrics)."""

    row_keys: list[tuple[str, ...]]
    column_keys: list[tuple[str, ...]]
    cells: dict[tuple[tuple[str, ...], tuple[str, ...], str], Cell]
    """(row, column, metric) -> the figure; absent if no run has ended."""


def pivot(grid: Grid, values: Sequence[Mapping[str, float] | None]) -> Pivot:
    """Arrange the values of the runs as a table.

    Args:
        grid: The grid.
        values: For each combination metric -> value; ``None`` if its run has not ended.
    """
    places = [
        (
            tuple(combination.keys[key] for key in grid.rows),
            tuple(combination.keys[key] for key in grid.columns),
        )
        for combination in grid.combinations
    ]
    figures: dict[tuple[tuple[str, ...], tuple[str, ...], str], list[float]] = {}
    for (row, column), run_values in zip(places, values, strict=True):
        if run_values is not None:
            for metric in grid.metrics:
                figures.setdefault((row, column, metric), []).append(run_values[metric])
    means = {place: float(np.mean(seeds)) for place, seeds in figures.items()}
    top: dict[tuple[tuple[str, ...], str], float] = {}  # of each row, or of each column
    for (row, column, metric), value in means.items():
        line = (row if grid.metric_rows else column), metric
        top[line] = max(value, top.get(line, value))
    cells = {
        (row, column, metric): Cell(
            value=means[row, column, metric],
            spread=float(np.std(seeds, ddof=1)) if len(seeds) > 1 else None,
            best=metric not in LIST_METRICS
            and means[row, column, metric] == top[row if grid.metric_rows else column, metric],
        )
        for (row, column, metric), seeds in figures.items()
    }
    return Pivot(
        row_keys=list(dict.fromkeys(row for row, _ in places)),
        column_keys=list(dict.fromkeys(column for _, column in places)),
        cells=cells,
    )
