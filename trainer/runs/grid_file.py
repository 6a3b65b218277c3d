"""A grid: a TOML file whose lists are crossed into combinations, each of them one run.

``[runs]`` holds ``model``, ``preset``, ``dataset``, ``features``, ``init``, ``transfer``, tables of
modalities (``text = "roberta:layer-10"``) and settings. A list is an axis; a table is an axis of
named variants, each of which sets some of these. ``[pretrain.NAME]`` describes a pre-training, and
``init = "NAME"`` starts from it; with ``protocol = "retrieval"`` the pre-training itself is
evaluated. Published tables in this form are recipes, see :mod:`trainer.runs.recipes`.
This module does not import torch: a bad file is refused before torch is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from features.documents import read_user_toml
from features.errors import UserError, unknown
from retrieval.list_metrics import LIST_METRICS
from retrieval.metrics import METRIC_NAMES
from trainer.evaluation.protocol import OCCURRENCES, TARGETS
from trainer.runs.grid_axes import (
    RETRIEVAL,
    SEED,
    Combination,
    cross_axes,
    read_axes,
    read_pretrainings,
    runs_table,
)

SPLITS = ("validation", "test")
SEEN = ("filtered", "kept")
METRIC = "metric"
"""In ``rows``: the metrics are rows, as in many published tables; otherwise they are columns."""
_SHOWN = ["HR@10", "NDCG@10"]
_LISTS = ("rows", "columns", "metrics", "first")
_TEXTS = ("title", "departs", "speed_up", "then")
_CHOICES = ("protocol", "split", "seen", "targets", "plot")
_TOP = (*_LISTS, *_TEXTS, *_CHOICES, "improvement", "pretrain", "runs")
_DEFAULTS = {
    "protocol": "ranking", "split": "test", "seen": "filtered", "targets": "all",
    "plot": "bars",
}  # fmt: skip
DIRECTIONS = ("text-to-vision", "vision-to-text")
"""Values of ``targets`` in the protocol ``retrieval``."""
PLOTS = ("bars", "lines", "curves")
"""Figures of ``mmrec grid --plot``: ``bars`` of the table, a panel for each dataset; ``lines`` of
the table over the k-cores of a dataset; ``curves`` of the validation metric."""
_RETRIEVAL_METRICS = ("Recall@1", "Recall@5", "Recall@10", "MRR")


@dataclass(frozen=True, kw_only=True, slots=True)
class Improvement:
    """The relative improvement of the best of some values of an axis over the best of others."""

    axis: str
    of: list[str]
    over: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """The combinations of a grid file, and the layout of its table of results."""

    path: Path
    protocol: str
    """``ranking`` of held-out targets, or ``retrieval`` of items across modalities."""
    rows: list[str]
    columns: list[str]
    metrics: list[str]
    split: str
    seen: str
    targets: str
    """Subset of the targets, one of :data:`trainer.evaluation.protocol.TARGETS`; a direction of
    retrieval, see :data:`DIRECTIONS`."""
    plot: str
    """One of :data:`PLOTS`."""
    speed_up: str
    """Value of an axis: the curve whose best value the speed-up of the other curves refers to;
    empty for none."""
    improvement: Improvement | None
    """Adds a row or a column; ``None`` for none."""
    then: str
    """A command to type after the grid; ``{NAME}`` is the run of the variant ``NAME``. Empty for
    none."""
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
    runs = runs_table(document, _TOP)
    for key in _LISTS:
        entries = document.get(key, [])
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise UserError(f"{key}={entries!r} must be a list of names")
    for key in _TEXTS:
        if not isinstance(document.get(key, ""), str):
            raise UserError(f"{key}={document[key]!r} must be text")
    axes = read_axes(runs)
    rows, columns = _placed(document, axes)
    choices = _choices(document)
    metrics = _metrics(document, choices)
    if choices["targets"] == OCCURRENCES:
        _check_occurrences(choices["split"], runs)
    fixed = {key: value for key, value in runs.items() if key not in axes}
    return Grid(
        path=path,
        rows=[key for key in rows if key != METRIC],
        columns=columns,
        metrics=metrics,
        **choices,
        metric_rows=METRIC in rows,
        title=document.get("title", ""),
        **{key: document.get(key, "") for key in ("departs", "speed_up", "then")},
        improvement=_improvement(document.get("improvement"), axes),
        combinations=cross_axes(
            fixed, axes, read_pretrainings(document.get("pretrain", {})), choices["protocol"]
        ),
    )


def _choices(document: dict[str, Any]) -> dict[str, str]:
    """Return the entries that have a few possible values."""
    is_retrieval = document.get("protocol") == RETRIEVAL
    known = {
        "protocol": ("ranking", RETRIEVAL),
        "split": SPLITS,
        "seen": SEEN,
        "targets": DIRECTIONS if is_retrieval else TARGETS,
        "plot": PLOTS,
    }
    choices = {}
    for name, options in known.items():
        default = DIRECTIONS[0] if is_retrieval and name == "targets" else _DEFAULTS[name]
        choices[name] = document.get(name, default)
        if choices[name] not in options:
            raise unknown(name, str(choices[name]), list(options))
    if choices["targets"] == "repeated" and choices["seen"] == "filtered":
        raise UserError("targets='repeated' are all missed with seen='filtered'; give seen='kept'")
    return choices


def _metrics(document: dict[str, Any], choices: Mapping[str, str]) -> list[str]:
    """Return the metrics of the table; ``Recall@k`` is ``HR@k`` where each user has one target."""
    is_retrieval = choices["protocol"] == RETRIEVAL
    recalls = [name.replace("HR@", "Recall@") for name in METRIC_NAMES if name.startswith("HR@")]
    known = [*METRIC_NAMES, *recalls, *LIST_METRICS]
    if is_retrieval:
        known = list(_RETRIEVAL_METRICS)
    metrics: list[str] = document.get("metrics", known[:3] if is_retrieval else _SHOWN)
    if not metrics:
        raise UserError("metrics=[] leaves the table empty; name one, or leave the key out")
    for metric in metrics:
        if metric not in known:
            raise unknown("metric", metric, known)
    lists = [metric for metric in metrics if metric in LIST_METRICS]
    if choices["targets"] != "all" and lists:
        raise UserError(f"{lists[0]} describes the lists of all users; leave targets out")
    return metrics


def _improvement(table: Any, axes: Mapping[str, Any]) -> Improvement | None:
    """Return the relative improvement that the table shows."""
    if table is None:
        return None
    if not isinstance(table, dict) or "of" not in table or not table.keys() <= {"of", "over"}:
        raise UserError(f"improvement={table!r} must be a table with of and, if not all, over")
    names = {}
    for key, value in table.items():
        names[key] = value if isinstance(value, list) else [value]
    wanted = [name for group in names.values() for name in group]
    for axis, values in axes.items():
        if all(name in values for name in wanted):
            others = [name for name in values if name not in names["of"]]
            return Improvement(axis=axis, of=names["of"], over=names.get("over", others))
    raise UserError(f"improvement names {', '.join(map(str, wanted))}: no axis has these values")


def _check_occurrences(split: str, runs: Mapping[str, Any]) -> None:
    """Refuse runs that learn the occurrences of cold items, which the grid ranks."""
    if split != "test":
        raise UserError(f"targets={OCCURRENCES!r} are of split='test', not {split!r}; change one")
    if runs.get("hold_out_cold") is not True:
        raise UserError(
            f"targets={OCCURRENCES!r} are only for runs that have not learned them; give"
            " hold_out_cold = true in [runs]"
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
