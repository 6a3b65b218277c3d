"""A search: a TOML file whose ranges and lists are the space of settings of ``mmrec tune``.

``[runs]`` holds what ``[runs]`` of a grid holds, see :mod:`trainer.runs.grid_file`. A list is a
choice, a table of tables is a choice of named variants, and a table with ``low`` and ``high`` is a
range of numbers. This module does not import torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from features.documents import read_user_toml
from features.errors import UserError, unknown
from trainer.runs.grid_axes import (
    Combination,
    Scalar,
    cross_axes,
    read_axes,
    runs_table,
    setting_text,
)

SAMPLERS = ("tpe", "random", "gp")
"""Samplers of Optuna: the tree-structured Parzen estimator, random search, a Gaussian process."""
PRUNERS = ("median", "none")
"""``median`` ends a trial whose best validation so far is below the median of the trials before at
the same epoch."""
_TOP = ("title", "trials", "timeout", "sampler", "pruner", "runs")
_TRIALS = 50
_RANGE = ("low", "high", "log", "step")
_SAME = (
    "dataset", "seed", "monitor", "monitor_seen", "monitor_users", "hold_out_cold", "ranker",
)  # fmt: skip
"""Entries that cannot be searched: the validation values of their trials are not comparable."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingRange:
    """A range of a setting, both ends included."""

    low: float
    high: float
    log: bool = False
    """Draw evenly over the logarithm."""
    step: float | None = None
    """Distance between two values; ``None``: any number, or any whole number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """The content of a search file."""

    path: Path
    trials: int
    """Largest number of trials that end, over all processes."""
    timeout: float | None
    """Seconds after which a process starts no other trial; ``None``: no limit."""
    sampler: str
    pruner: str
    runs: Mapping[str, Any]
    """The table ``[runs]`` as it is in the file."""
    fixed: Mapping[str, Scalar]
    axes: Mapping[str, Mapping[str, Mapping[str, Scalar]]]
    """Name -> value as text -> the entries that the value sets."""
    ranges: Mapping[str, SettingRange]

    def combination(self, values: Mapping[str, Any]) -> Combination:
        """Return the run of a trial.

        Args:
            values: Name of each axis and range -> value as text, or number.

        Raises:
            UserError: The entries contradict each other.
        """
        entries = dict(self.fixed)
        for name, value in values.items():
            entries.update(self.axes[name][value] if name in self.axes else {name: value})
        (combination,) = cross_axes(entries, {}, {}, "ranking")
        return replace(combination, keys={key: value_text(value) for key, value in values.items()})

    def varied_names(self) -> set[str]:
        """Return the entries that the trials set differently."""
        variants = [sets for values in self.axes.values() for sets in values.values()]
        return {*self.ranges, *(name for sets in variants for name in sets)}


def value_text(value: Scalar) -> str:
    """Return the value of a trial as tables show it: floats with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else setting_text(value)


def read_search(path: Path) -> Search:
    """Read a search file.

    Raises:
        UserError: One line that names the file, what is wrong in it, and the remedy.
    """
    document = read_user_toml(path)
    try:
        return _search(path, document)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _search(path: Path, document: dict[str, Any]) -> Search:
    runs = runs_table(document, _TOP)
    ranges = {key: _range(key, value) for key, value in runs.items() if _is_range(value)}
    others = {key: value for key, value in runs.items() if key not in ranges}
    axes = read_axes(others)
    fixed = {key: value for key, value in others.items() if key not in axes}
    search = Search(
        path=path,
        trials=_positive("trials", document.get("trials", _TRIALS), (int,)),
        timeout=_positive("timeout", document.get("timeout"), (int, float)),
        sampler=_choice("sampler", document.get("sampler", SAMPLERS[0]), SAMPLERS),
        pruner=_choice("pruner", document.get("pruner", PRUNERS[0]), PRUNERS),
        runs=runs,
        fixed=fixed,
        axes=axes,
        ranges=ranges,
    )
    _check_space(search)
    return search


def _check_space(search: Search) -> None:
    """Refuse a space that is empty, sets an entry twice, or has values that cannot be compared."""
    if not search.axes and not search.ranges:
        raise UserError(
            "[runs] has nothing to search; give a list or a range, such as"
            " lr = {low = 1e-4, high = 1e-2, log = true}"
        )
    varied = search.varied_names()
    for name in _SAME:
        if name in varied:
            raise UserError(
                f"{name} cannot be searched: its values cannot be compared on the validation"
                " split; give one value"
            )
    for name in search.ranges:
        others = [sets for values in search.axes.values() for sets in values.values()]
        if any(name in sets for sets in others):
            raise UserError(f"{name} is set by its range and by a variant; set it by one")
    first = {name: next(iter(values)) for name, values in search.axes.items()}
    search.combination({**first, **{name: entry.low for name, entry in search.ranges.items()}})


def _is_range(value: Any) -> bool:
    """Return True for a table that describes numbers; the values of variants are tables."""
    return isinstance(value, dict) and not any(isinstance(inner, dict) for inner in value.values())


def _range(key: str, table: dict[str, Any]) -> SettingRange:
    for name in table:
        if name not in _RANGE:
            raise unknown(f"entry of the range {key}", name, list(_RANGE))
    for name in ("low", "high"):
        if name not in table:
            raise UserError(f"the range {key} has no {name}; give low and high")
    for name in ("low", "high", "step"):
        value = table.get(name)
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            raise UserError(f"{key}.{name}={value!r} must be a number")
    entry = SettingRange(**table)
    if type(entry.log) is not bool:
        raise UserError(f"{key}.log={entry.log!r} must be true or false")
    if entry.low >= entry.high:
        raise UserError(f"{key}.low={entry.low} must be below {key}.high={entry.high}")
    if entry.log and entry.low <= 0:
        raise UserError(f"{key}.low={entry.low} must be above 0 with log=true")
    if entry.log and entry.step is not None:
        raise UserError(f"the range {key} has log and step; give one of them")
    if entry.step is not None and entry.step <= 0:
        raise UserError(f"{key}.step={entry.step} must be above 0")
    return entry


def _positive(key: str, value: Any, kinds: tuple[type, ...]) -> Any:
    if value is None and key == "timeout":
        return None
    if type(value) not in kinds or not 0 < value < math.inf:
        kind = "a whole number" if kinds == (int,) else "a number of seconds"
        raise UserError(f"{key}={value!r} must be {kind} above 0")
    return value


def _choice(key: str, value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        raise unknown(key, str(value), list(known))
    return str(value)
