"""A page about one run or several: what was trained, how it went, and what came of it."""

import io
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from features.errors import UserError
from features.warehouse import Warehouse
from trainer.analysis.compare import SEEN, SIGNS, Comparison, compare
from trainer.analysis.curves import Curve, draw, write
from trainer.analysis.html import Markup, document, note, table
from trainer.evaluation.protocol import protocol_lines
from trainer.runs.read import Record, read_metrics

_REFERENCES = ("popularity", "untrained", "features")
"""Rankers that stand beside the model, behind the runs."""


def build_report(warehouse: Warehouse, records: Sequence[Record], curves: Sequence[Curve]) -> str:
    """Write the page.

    Args:
        warehouse: Holds the runs, and may hold their datasets.
        records: The runs.
        curves: One for each of them, with what it is called on the page.

    Returns:
        The whole HTML document; equal runs give equal pages.
    """
    names = [curve.label for curve in curves]
    title = names[0] if len(names) == 1 else f"{len(names)} runs: {', '.join(names)}"
    sections = [
        f"<h1>{escape(title)}</h1>",
        _overview(records, curves),
        "<h2>Convergence</h2>",
        _figure(curves),
        "<h2>Test</h2>",
        *_tests(records, names),
        *_comparisons(warehouse, records, names),
        "<h2>Settings</h2>",
        *_settings(records, names),
        "<h2>Features</h2>",
        *_features(records, names),
        "<h2>Protocol</h2>",
        *_protocol(warehouse, records),
    ]
    return document(title, sections)


def _overview(records: Sequence[Record], curves: Sequence[Curve]) -> str:
    facts: dict[str, Callable[[Record, Curve], Any]] = {
        "run": lambda record, curve: record.name,
        "model": lambda record, curve: record.about["model"],
        "stage": lambda record, curve: record.about.get("stage"),
        "dataset": lambda record, curve: record.about["dataset"],
        "features": lambda record, curve: ", ".join(record.about["features"]) or "item ids",
        "started from": lambda record, curve: _origin(record),
        "begun (UTC)": lambda record, curve: str(record.about.get("created", ""))[:19],
        "parameters": lambda record, curve: record.about.get("parameters"),
        "epochs": lambda record, curve: len(curve.loss),
        "best epoch": lambda record, curve: (
            int(curve.validated[curve.best]) if curve.best >= 0 else None
        ),
        f"validation {curves[0].metric}": lambda record, curve: (
            float(curve.values[curve.best]) if curve.best >= 0 else None
        ),
        "time until the best epoch": lambda record, curve: _time(curve, until_best=True),
        "time in all": lambda record, curve: _time(curve, until_best=False),
    }
    pairs = list(zip(records, curves, strict=True))
    if all(record.name == curve.label for record, curve in pairs):
        del facts["run"]
    rows = [
        [name, *(fact(record, curve) for record, curve in pairs)] for name, fact in facts.items()
    ]
    rows = [row for row in rows if any(value is not None for value in row[1:])]
    heads = ["", *(curve.label for curve in curves)]
    if len(curves) == 1:
        heads = []
    return table(heads, rows)


def _origin(record: Record) -> str | None:
    init = record.about.get("init")
    return f"{init['run']} ({init['transfer']})" if isinstance(init, dict) else None


def _time(curve: Curve, *, until_best: bool) -> str | None:
    if curve.seconds is None or (until_best and curve.best < 0):
        return None
    last = int(curve.validated[curve.best]) - 1 if until_best else -1
    seconds = float(curve.seconds[last])
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _figure(curves: Sequence[Curve]) -> str:
    stream = io.BytesIO()
    write(draw(curves), stream, "svg")
    text = stream.getvalue().decode("utf-8")
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    # The page decides how wide it is; its own measures are those of paper.
    text = re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1 VERSION>", text, count=1)
    about = 'role="img" aria-label="training loss and validation metric by epoch and by time"'
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    text = text.replace("VERSION>", f"{spaces} {about}>", 1)
    notes = ["Rings: the epoch whose weights are kept, the best one on validation."]
    if len(curves) > 1:
        notes.append("Times are of the machine, and of what else ran on it.")
        notes.append("Losses can be compared only between runs of one objective.")
    without = [curve.label for curve in curves if curve.seconds is None]
    if without:
        notes.append(f"No times were kept of: {', '.join(without)}.")
    return f"<figure>\n{text}\n<figcaption>{escape(' '.join(notes))}</figcaption>\n</figure>"


def _tests(records: Sequence[Record], names: Sequence[str]) -> Iterable[str]:
    """For each dataset and each kind of targets, a row for each metric."""
    held = [
        [row for row in read_metrics(record) if (row["phase"], row["split"]) == ("eval", "test")]
        for record in records
    ]
    for record, name, rows in zip(records, names, held, strict=True):
        if not rows:
            what = "eval --protocol retrieval" if record.pretraining else "eval"
            remedy = f"mmrec {what} --run {record.name}"
            yield note(f"{name} is not evaluated; run: {remedy}")
    groups = dict.fromkeys(
        (record.about["dataset"], row["targets"], row["users"], row["seen"])
        for record, rows in zip(records, held, strict=True)
        for row in rows
    )
    if len(records) == 1:  # both rankings of one run fit beside each other
        groups = dict.fromkeys((*group[:3], "") for group in groups)
    for group in groups:
        dataset, targets, users, seen = group
        columns: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        for record, name, rows in zip(records, names, held, strict=True):
            for row in rows:
                found = (record.about["dataset"], row["targets"], row["users"], row["seen"])
                if found[:3] == group[:3] and seen in ("", row["seen"]):
                    who = name if row["ranker"] == record.about["model"] else row["ranker"]
                    columns.setdefault((who, row["seen"]), {})[row["metric"]] = row
        order = sorted(columns, key=lambda column: column[0] in _REFERENCES)
        shown = []
        for metric in dict.fromkeys(metric for column in columns.values() for metric in column):
            cells = {column: columns[column][metric] for column in order}
            top = {where: _best(cells, where) for _, where in order}
            shown.append([metric, *(_interval(cells[c], top[c[1]]) for c in order)])
        heads = [
            f"{who}\n{where}" if seen == "" and where != "none" else who for who, where in order
        ]
        kind = {"all": "all targets", "cold": "cold targets only"}.get(targets, targets)
        ranking = f", {seen}" if seen not in ("", "none") else ""
        unit = "items" if any(where == "none" for _, where in order) else "users"
        caption = f"{dataset}, {kind}{ranking}: {users:,} {unit}"
        yield table(["metric", *heads], shown, caption=caption)


def _best(cells: dict[tuple[str, str], dict[str, Any]], seen: str) -> float | None:
    """The highest value in a row, where several runs are in it."""
    values = [
        row["value"]
        for (_, where), row in cells.items()
        if where == seen and row["ranker"] not in _REFERENCES
    ]
    return max(values) if len(values) > 1 else None


def _interval(row: dict[str, Any], best: float | None) -> Markup:
    found = f"{row['value']:.4f}"
    if row["value"] == best:
        found = f"<b>{found}</b>"
    if row["low"] is None or row["ranker"] == _REFERENCES[0]:
        return Markup(found)
    low, high = (f"{row[key]:.4f}".replace("0.", ".", 1) for key in ("low", "high"))
    return Markup(f"{found} <small>[{low}, {high}]</small>")


def _comparisons(
    warehouse: Warehouse, records: Sequence[Record], names: Sequence[str]
) -> Iterable[str]:
    called = {record.name: name for record, name in zip(records, names, strict=True)}
    evaluated = [r for r in records if (r.folder / "predictions.parquet").exists()]
    for dataset in dict.fromkeys(record.about["dataset"] for record in evaluated):
        runs = [record.name for record in evaluated if record.about["dataset"] == dataset]
        if len(runs) < 2:
            continue
        try:
            found = compare(warehouse, runs)
        except UserError as error:
            yield note(f"not compared: {error}")
            continue
        first = called[found.systems[0].label]
        yield f"<h2>Differences to {escape(first)} on {escape(dataset)}</h2>"
        yield _compared(found, called)
        yield note(
            "Mean over users with its 95% bootstrap interval; p: two-sided paired randomisation"
            f" test over users, {SIGNS:,} random signs, not corrected for the number of tests, and"
            " silent on the luck of a training seed."
        )


def _compared(found: Comparison, called: dict[str, str]) -> str:
    cells = {(line.metric, line.seen, line.system): line.test for line in found.lines}
    rows = []
    for metric in dict.fromkeys(line.metric for line in found.lines):
        for number, system in enumerate(found.systems[1:]):
            row: list[Any] = [metric if number == 0 else "", called[system.label]]
            for seen in SEEN:
                test = cells[metric, seen, system.label]
                assert test is not None
                low, high = (f"{x:.4f}".replace("0.", ".", 1) for x in (test.low, test.high))
                row.append(Markup(f"{test.difference:+.4f} <small>[{low}, {high}]</small>"))
                row.append(Markup(f"{test.p_value:.4f}"))
            rows.append(row)
    heads = ["metric", "run", *(head for seen in SEEN for head in (seen, "p"))]
    return table(heads, rows)


def _settings(records: Sequence[Record], names: Sequence[str]) -> Iterable[str]:
    """What differs first; the rest, or all of one run, folded away."""
    keys = dict.fromkeys(key for record in records for key in record.settings)
    rows = {key: [record.settings.get(key) for record in records] for key in keys}
    differing = {key for key, values in rows.items() if any(v != values[0] for v in values)}
    if len(records) > 1:
        yield table(
            ["setting", *names],
            [[key, *map(_setting, rows[key])] for key in rows if key in differing],
            caption="What differs" if differing else "Nothing differs",
        )
    rest = [[key, _setting(values[0])] for key, values in rows.items() if key not in differing]
    what = "What all of them share" if len(records) > 1 else "All settings"
    yield f"<details{'' if len(records) > 1 else ' open'}><summary>{what}</summary>"
    yield table(["setting", "value"], rest)
    yield "</details>"


def _setting(value: Any) -> str:
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _features(records: Sequence[Record], names: Sequence[str]) -> Iterable[str]:
    """Where the vectors came from, as the weights remember it; equal tables stand once."""
    readers: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for record, name in zip(records, names, strict=True):
        for entry in record.identity.get("features", []):
            key = tuple((str(k), str(v)) for k, v in sorted(entry.items()))
            readers.setdefault(key, []).append(name)
    if not readers:
        yield note("Item ids alone, or no weights yet.")
        return
    tables = [dict(key) for key in readers]
    order = ("modality", "backbone", "level", "checkpoint", "preprocessing", "pooling")
    keys = [*order, *sorted({key for one in tables for key in one} - {*order})]
    rows: list[list[Any]] = [
        [key, *(one.get(key) for one in tables)]
        for key in keys
        if any(key in one for one in tables)
    ]
    if len(records) > 1:
        rows.append(["read by", *(", ".join(who) for who in readers.values())])
    yield table([], rows)


def _protocol(warehouse: Warehouse, records: Sequence[Record]) -> Iterable[str]:
    for dataset in dict.fromkeys(record.about["dataset"] for record in records):
        members = [record for record in records if record.about["dataset"] == dataset]
        try:
            info = warehouse.info(dataset)
        except UserError:
            yield note(f"{dataset} is not in this warehouse any more, or is several datasets.")
            continue
        if any(record.about["fingerprint"] != info.fingerprint for record in members):
            yield note(f"{dataset} has been prepared anew since; its protocol may have changed.")
            continue
        figures = info.summary()
        yield table(
            ["dataset", "users", "items", "interactions", "average length", "sparsity"],
            [
                [
                    dataset,
                    info.users,
                    info.items,
                    info.interactions,
                    Markup(f"{figures['average_length']:.2f}"),
                    Markup(f"{figures['sparsity']:.4%}"),
                ]
            ],
        )
        if not all(record.pretraining for record in members):
            lines = "".join(f"<li>{escape(line)}</li>" for line in protocol_lines(info))
            yield f"<ul>{lines}</ul>"
