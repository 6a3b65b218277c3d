"""Build the HTML page of ``mmrec report``: overview, curves, test metrics, settings, protocol.

Each section is computed here as plain tables and texts; ``report.html.j2`` arranges them.
"""

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from features.errors import DamagedError, UserError
from features.warehouse import DatasetInfo, Warehouse
from retrieval.list_metrics import LIST_METRICS
from retrieval.metrics import single_best
from trainer.analysis.compare import SEEN, SIGNS, Comparison, compare
from trainer.analysis.curves import Curve
from trainer.analysis.figures import draw_curves, image_data, inline_svg
from trainer.analysis.maps import RunMap, draw_maps
from trainer.data.control import MEANINGS
from trainer.evaluation.protocol import (
    REFERENCES,
    TARGETS,
    earlier_protocol_line,
    protocol_lines,
    ties_lines,
)
from trainer.runs.read import Record, has_current_protocol, read_metrics

_REFERENCES = (*REFERENCES, "ridge", "untrained", "features")
"""Reference rankers; tables show them after the runs."""
_CURVES_TEXT = "training loss and validation metric by epoch and by time"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A cell with a metric or a difference, and its interval where there is one."""

    value: float
    low: float | None
    high: float | None
    is_best: bool = False
    is_signed: bool = False


@dataclass(frozen=True, slots=True)
class PageTable:
    """A table of the page; the first column names the rows."""

    headings: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""

    def is_numeric(self, column: int) -> bool:
        """Return whether all cells of a column are numbers; such a column is aligned right."""
        cells = [row[column] for row in self.rows]
        return bool(cells) and all(isinstance(c, int | float | Estimate | None) for c in cells)


def build_report(
    warehouse: Warehouse,
    records: Sequence[Record],
    curves: Sequence[Curve],
    maps: Sequence[RunMap] = (),
) -> str:
    """Build the page about runs.

    Args:
        warehouse: The warehouse of the runs, and of their datasets where they still exist.
        records: The runs.
        curves: One curve for each run, with the label of the run on the page.
        maps: Maps of one or two of the runs; empty for a page without a map.

    Returns:
        The whole HTML document, which loads nothing. Equal runs give equal documents.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"figure": _figure_text, "bound": _bound_text}
    labels = [curve.label for curve in curves]
    return environment.get_template("report.html.j2").render(
        title=labels[0] if len(labels) == 1 else f"{len(labels)} runs: {', '.join(labels)}",
        version=importlib.metadata.version("mmrec"),
        overview=_overview(records, curves),
        figure=Markup(inline_svg(draw_curves(curves), _CURVES_TEXT)),
        map_image=image_data(draw_maps(maps)) if maps else "",
        figure_notes=_figure_notes(curves),
        features=_features(records, labels),
        **_tests(records, labels),
        **_comparisons(warehouse, records, labels),
        **_settings(records, labels),
        **_protocols(warehouse, records),
    )


def _figure_text(value: Any, *, signed: bool = False) -> str:
    if isinstance(value, float):
        return f"{value:{'+' if signed else ''}.4f}" if np.isfinite(value) else "-"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _bound_text(value: float) -> str:
    return f"{value:.4f}".replace("0.", ".", 1)


def _overview(records: Sequence[Record], curves: Sequence[Curve]) -> PageTable:
    facts: dict[str, Callable[[Record, Curve], Any]] = {
        "run": lambda record, curve: record.name,
        "model": lambda record, curve: record.about["model"],
        "stage": lambda record, curve: record.about.get("stage"),
        "dataset": lambda record, curve: record.about["dataset"],
        "features": lambda record, curve: ", ".join(record.about["features"]) or "item ids",
        "control": lambda record, curve: MEANINGS.get(record.control),
        "initial weights": lambda record, curve: _initial_weights(record),
        "begun (UTC)": lambda record, curve: str(record.about.get("created", ""))[:19],
        "parameters": lambda record, curve: record.about.get("parameters"),
        "epochs": lambda record, curve: len(curve.loss),
        "best epoch": lambda record, curve: curve.best_epoch,
        f"validation {curves[0].metric}": lambda record, curve: curve.best_value,
        "time until the best epoch": lambda record, curve: _duration(curve, curve.best_epoch),
        "time in all": lambda record, curve: _duration(curve, len(curve.loss)),
    }
    pairs = list(zip(records, curves, strict=True))
    if all(record.name == curve.label for record, curve in pairs):
        del facts["run"]
    rows = [
        [name, *(fact(record, curve) for record, curve in pairs)] for name, fact in facts.items()
    ]
    rows = [row for row in rows if any(value is not None for value in row[1:])]
    return PageTable(["", *(curve.label for curve in curves)] if len(curves) > 1 else [], rows)


def _initial_weights(record: Record) -> str | None:
    init = record.about.get("init")
    return f"{init['run']} ({init['transfer']})" if isinstance(init, dict) else None


def _duration(curve: Curve, epoch: int | None) -> str | None:
    """Return the time until the end of an epoch, as text."""
    if curve.seconds is None or epoch is None:
        return None
    seconds = float(curve.seconds[epoch - 1])
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _figure_notes(curves: Sequence[Curve]) -> list[str]:
    notes = ["A ring marks the best epoch on validation, whose weights are kept."]
    if len(curves) > 1:
        notes.append("Times depend on the machine and on its load.")
        notes.append("Losses are comparable only between runs of one objective.")
    untimed = [curve.label for curve in curves if curve.seconds is None]
    if untimed:
        notes.append(f"Runs without recorded times: {', '.join(untimed)}.")
    return notes


_Rows = Sequence[dict[str, Any]]
_Ranker = tuple[str, str]
"""Label of a run or name of a reference ranker, and ``filtered``, ``kept`` or ``none``."""


def _tests(records: Sequence[Record], labels: Sequence[str]) -> dict[str, Any]:
    """Return tables of the test metrics, those of one dataset and target group together."""
    notes = []
    repeated: dict[str, int] = {}
    groups: dict[tuple[str, str, int], dict[_Ranker, dict[str, dict[str, Any]]]] = {}
    for record, label in zip(records, labels, strict=True):
        rows = [
            row for row in read_metrics(record) if (row["phase"], row["split"]) == ("eval", "test")
        ]
        if not rows:
            command = "eval --protocol retrieval" if record.pretraining else "eval"
            notes.append(f"{label} is not evaluated; run: mmrec {command} --run {record.name}")
        elif not has_current_protocol(record.folder):
            notes.append(earlier_protocol_line(label))
        for row in rows:
            if row["targets"] == "repeated":
                repeated[record.about["dataset"]] = row["users"]
            group = groups.setdefault((record.about["dataset"], row["targets"], row["users"]), {})
            ranker = label if row["ranker"] == record.about["model"] else row["ranker"]
            group.setdefault((ranker, row["seen"]), {})[row["metric"]] = row
    is_current = all(has_current_protocol(record.folder) for record in records)
    tables = [
        _test_tables(
            f"{dataset}, {_target_group(targets)}",
            count,
            rankers,
            repeated.get(dataset, 0) / count if targets == "all" and is_current else None,
        )
        for (dataset, targets, count), rankers in groups.items()
    ]
    return {"test_notes": notes, "test_tables": tables}


def _target_group(targets: str) -> str:
    return (
        "all targets"
        if targets == "all"
        else (f"{targets} targets only" if targets in TARGETS else targets)
    )


def _test_tables(
    caption: str,
    count: int,
    rankers: dict[_Ranker, dict[str, dict[str, Any]]],
    repeated: float | None,
) -> list[PageTable]:
    """Return a table for each ranking (seen items filtered, kept, or neither).

    The share of repeated targets is printed, if there is one.
    """
    share = "" if repeated is None else f", {repeated:.2%} repeated targets"
    tables = []
    for seen in dict.fromkeys(seen for _, seen in rankers):
        columns = {name: metrics for (name, kind), metrics in rankers.items() if kind == seen}
        order = sorted(columns, key=lambda name: name in _REFERENCES)
        rows = []
        for metric in dict.fromkeys(metric for column in columns.values() for metric in column):
            cells = [columns[name].get(metric) for name in order]
            rows.append([metric, *_estimates(cells)])
        ranking = "" if seen == "none" else f", seen items {seen}"
        unit = "items" if seen == "none" else "users"
        headings = ["metric", *order]
        tables.append(PageTable(headings, rows, f"{caption}{ranking}: {count:,} {unit}{share}"))
    return tables


def _estimates(cells: Sequence[dict[str, Any] | None]) -> list[Estimate | None]:
    """Return the cells of a row; the highest value of several runs is marked unless it is tied."""
    runs = [cell for cell in cells if cell is not None and cell["ranker"] not in _REFERENCES]
    best = None
    if len(runs) > 1 and runs[0]["metric"] not in LIST_METRICS:
        number = single_best([cell["value"] for cell in runs])
        best = None if number is None else runs[number]
    estimates: list[Estimate | None] = []
    for cell in cells:
        if cell is None:
            estimates.append(None)
            continue
        has_interval = cell["ranker"] not in REFERENCES
        estimates.append(
            Estimate(
                value=cell["value"],
                low=cell["low"] if has_interval else None,
                high=cell["high"] if has_interval else None,
                is_best=cell is best,
            )
        )
    return estimates


def _comparisons(
    warehouse: Warehouse, records: Sequence[Record], labels: Sequence[str]
) -> dict[str, Any]:
    """Compare the evaluated runs of each dataset with the first one of them."""
    label_of = {record.name: label for record, label in zip(records, labels, strict=True)}
    evaluated = [r for r in records if (r.folder / "predictions.parquet").exists()]
    comparisons, notes = [], []
    for dataset in dict.fromkeys(record.about["dataset"] for record in evaluated):
        names = [record.name for record in evaluated if record.about["dataset"] == dataset]
        if len(names) < 2:
            continue
        try:
            comparison = compare(warehouse, names)
        except DamagedError:
            raise
        except UserError as error:
            notes.append(f"The runs on {dataset} are not compared: {error}")
            continue
        reference = label_of[comparison.systems[0].label]
        comparisons.append(
            {
                "heading": f"Differences to {reference} on {dataset}",
                "table": _differences(comparison, label_of),
                "notes": [
                    "Mean over users with its 95% bootstrap interval. p: two-sided paired"
                    f" randomisation test over users with {SIGNS:,} random signs, not corrected for"
                    " the number of tests. Neither covers the variation between training seeds."
                ],
            }
        )
    return {"comparisons": comparisons, "comparison_notes": notes}


def _differences(comparison: Comparison, label_of: dict[str, str]) -> PageTable:
    tests = {(line.metric, line.seen, line.system): line.test for line in comparison.lines}
    rows = []
    for metric in dict.fromkeys(line.metric for line in comparison.lines):
        for number, system in enumerate(comparison.systems[1:]):
            row: list[Any] = [metric if number == 0 else "", label_of[system.label]]
            for seen in SEEN:
                test = tests[metric, seen, system.label]
                assert test is not None
                row.append(Estimate(test.difference, test.low, test.high, is_signed=True))
                row.append(test.p_value)
            rows.append(row)
    return PageTable(["metric", "run", *(name for seen in SEEN for name in (seen, "p"))], rows)


def _settings(records: Sequence[Record], labels: Sequence[str]) -> dict[str, Any]:
    """Return the settings in which several runs differ, and the other settings."""
    keys = dict.fromkeys(key for record in records for key in record.settings)
    values = {key: [record.settings.get(key) for record in records] for key in keys}
    different = [key for key in keys if any(value != values[key][0] for value in values[key])]
    shared = [[key, _setting_text(values[key][0])] for key in keys if key not in different]
    table = None
    if len(records) > 1:
        rows = [[key, *map(_setting_text, values[key])] for key in different]
        caption = "Settings that differ" if different else "No setting differs"
        table = PageTable(["setting", *labels], rows, caption)
    return {"different_settings": table, "shared_settings": PageTable(["setting", "value"], shared)}


def _setting_text(value: Any) -> str:
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _features(records: Sequence[Record], labels: Sequence[str]) -> PageTable | None:
    """Return the provenance of the feature tables, as recorded with the weights."""
    readers: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for record, label in zip(records, labels, strict=True):
        for entry in record.identity.get("features", []):
            provenance = tuple((str(key), str(value)) for key, value in sorted(entry.items()))
            readers.setdefault(provenance, []).append(label)
    if not readers:
        return None
    tables = [dict(provenance) for provenance in readers]
    first = ("modality", "backbone", "level", "checkpoint", "preprocessing", "pooling")
    keys = [*first, *sorted({key for table in tables for key in table} - {*first})]
    rows: list[list[Any]] = [
        [key, *(table.get(key) for table in tables)]
        for key in keys
        if any(key in table for table in tables)
    ]
    if len(records) > 1:
        rows.append(["read by", *(", ".join(names) for names in readers.values())])
    return PageTable([], rows)


def _is_prepared_again(record: Record, info: DatasetInfo) -> bool:
    """Return True if the dataset has other items than the run, or another order of ties."""
    current = (info.fingerprint, info.ties)
    return (record.about["fingerprint"], record.about.get("ties", info.ties)) != current


def _protocols(warehouse: Warehouse, records: Sequence[Record]) -> dict[str, Any]:
    """Return the counts and the evaluation protocol of each dataset."""
    protocols, notes = [], []
    for dataset in dict.fromkeys(record.about["dataset"] for record in records):
        members = [record for record in records if record.about["dataset"] == dataset]
        try:
            info = warehouse.info(dataset)
        except DamagedError:
            raise
        except UserError:
            notes.append(f"{dataset} is no longer in this warehouse, or is several datasets.")
            continue
        if any(_is_prepared_again(record, info) for record in members):
            notes.append(f"{dataset} was prepared again after training; its protocol may differ.")
            for line in dict.fromkeys(chain(*(ties_lines(*record.ties) for record in members))):
                notes.append(f"{dataset} as it was: {line}.")
            continue
        summary = info.summary()
        counts = [info.users, info.items, info.interactions]
        shares = [f"{summary['average_length']:.2f}", f"{summary['sparsity']:.4%}"]
        headings = ["dataset", "users", "items", "interactions", "average length", "sparsity"]
        is_ranked = not all(record.pretraining for record in members)
        protocols.append(
            {
                "table": PageTable(headings, [[dataset, *counts, *shares]]),
                "lines": protocol_lines(info) if is_ranked else [],
            }
        )
    return {"protocols": protocols, "protocol_notes": notes}
