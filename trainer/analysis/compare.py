"""Compare runs on the same users: metrics, differences, and paired tests of the differences.

The ``predictions.parquet`` of each run holds the rank of every user's target, so two runs are
compared user by user. The sample is the users. Several runs, such as runs that differ only in
their seed, can form one system: its value for a user is the mean over its runs, and the standard
deviation over its runs is reported separately.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features.atomic_files import read_errors
from features.errors import UserError, unknown
from features.result_tables import read_predictions_table
from features.warehouse import Warehouse
from retrieval.metrics import METRIC_NAMES, UNRANKED, per_user
from retrieval.significance import PairedTest, paired_test
from trainer.data.control import NONE, marked
from trainer.evaluation.protocol import (
    HIDDEN,
    OCCURRENCES,
    TARGETS,
    TRAIN,
    earlier_protocol_line,
    ties_lines,
)
from trainer.runs.read import Record, has_current_protocol, read_records

SPLITS = ("validation", "test")
SEEN = ("filtered", "kept")
SIGNS = 10_000
"""Number of random sign assignments of a paired test."""
DEFAULT_METRICS = ("HR@10", "HR@50", "NDCG@10", "NDCG@50", "MRR")

Values = npt.NDArray[np.float64]


def settings_key(record: Record) -> str:
    """Return everything that decides the result of a run except its seed."""
    settings = {key: value for key, value in record.settings.items() if key != "seed"}
    init = record.about.get("init", {})
    return repr((record.about["model"], record.about["features"], sorted(settings.items()), init))


GROUPINGS: dict[str, Callable[[Record], str]] = {
    "run": lambda record: record.name,
    "model": lambda record: marked(str(record.about["model"]), record.control),
    "settings": settings_key,
}
"""Name of a grouping -> the key that all runs of one system share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """One side of a comparison: a run, or several runs whose values are averaged."""

    label: str
    runs: list[str]
    settings: str
    """Settings of the first run that are not its model's defaults; of several runs without the
    seed."""
    control: str = NONE
    """Control of the features of the runs, see :mod:`trainer.data.control`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SystemMetric:
    """Value of one metric for one system, and its difference to the first system."""

    metric: str
    seen: str
    system: str
    value: float
    spread: float | None
    """Standard deviation over the runs of the system; None for a single run."""
    test: PairedTest | None
    """Test of this system minus the first system; None for the first system."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Result of :func:`compare`."""

    dataset: str
    split: str
    targets: str
    users: int
    repeated: float
    """Share of the targets of the split that the user already had."""
    systems: list[System]
    lines: list[SystemMetric]
    protocol: list[str]
    """Facts about the data that decide the values, one statement a line."""


def compare(
    warehouse: Warehouse,
    names: Sequence[str],
    *,
    split: str = "test",
    targets: str = "all",
    metrics: Sequence[str] = DEFAULT_METRICS,
    by: str = "run",
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Comparison:
    """Compare evaluated runs of one preparation of a dataset, user by user.

    Args:
        warehouse: The warehouse of the runs.
        names: Names of the runs. The system of the first run is the reference.
        split: ``test`` or ``validation``.
        targets: ``all``; ``cold``: users whose target has fewer than 10 training interactions;
            ``repeated``: users who already had the target, with seen items kept only; ``new``: all
            others; ``hidden``: users whose target is a hidden item; ``cold-occurrences``: all
            occurrences of cold items but in validation, for runs trained with ``hold_out_cold``.
        metrics: Names such as ``NDCG@10``.
        by: Name of a grouping in :data:`GROUPINGS`; runs with one key form one system.
        on_stage: Receives the name of each step.

    Raises:
        UserError: A run is unknown, is not evaluated, or has other data than the first run.
    """
    for kind, value, known in (
        ("split", split, SPLITS), ("targets", targets, TARGETS), ("grouping", by, GROUPINGS),
        *(("metric", metric, METRIC_NAMES) for metric in metrics),
    ):  # fmt: skip
        if value not in known:
            raise unknown(kind, value, list(known))
    records = read_records(warehouse, names)
    systems = _group(records, by)
    for record in records:
        _check_comparable(records[0], record)
    if targets == OCCURRENCES:
        _check_occurrences(records, split)
    users, ranks = _read_ranks(records, split, with_train=targets == OCCURRENCES)
    chosen = _choose_users(users, split, targets, _first_hidden(warehouse, records[0], targets))
    lines = []
    for seen in SEEN if targets != "repeated" else ("kept",):
        values = {
            system.label: [per_user(ranks[name][seen][chosen]) for name in system.runs]
            for system in systems
        }
        for metric in dict.fromkeys(metrics):
            on_stage(f"paired tests of {metric}, {seen}")
            lines += _compare_metric(metric, seen, values, users.target[chosen, 0])
    return Comparison(
        dataset=records[0].about["dataset"],
        split=split,
        targets=targets,
        users=int(chosen.sum()),
        repeated=float(users.repeated.mean()),
        systems=systems,
        lines=lines,
        protocol=_protocol_lines(records),
    )


def _protocol_lines(records: Sequence[Record]) -> list[str]:
    """Return what a reader must know about the order of ties and about earlier protocols."""
    earlier = [record for record in records if not has_current_protocol(record.folder)]
    return [
        *ties_lines(*records[0].ties),
        *(earlier_protocol_line(record.name) for record in earlier),
    ]


def _first_hidden(warehouse: Warehouse, record: Record, targets: str) -> int | None:
    """Return the first hidden item of the dataset of a run, which must be as it was evaluated.

    ``None`` if ``targets`` is another subset.
    """
    if targets != HIDDEN:
        return None
    info = warehouse.info(record.about["dataset"])
    if info.fingerprint != record.identity["items"]:
        raise UserError(
            f"dataset {info.name!r} has other items than run {record.name!r}, so its hidden items"
            " are not known; prepare it as before, or leave --targets hidden out"
        )
    return info.items - info.hidden_items


def _choose_users(
    users: "_Users", split: str, targets: str, hidden_from: int | None
) -> npt.NDArray[np.bool_]:
    """Return the users whose targets belong to a subset, (E,); at least one user.

    Args:
        users: The evaluated users.
        split: Name of the split, for an error.
        targets: The subset.
        hidden_from: The first hidden item; ``None``: no item is hidden.
    """
    is_hidden = np.zeros(len(users.cold), bool)
    if hidden_from is not None:
        is_hidden = users.target[:, 1] >= hidden_from
    chosen: npt.NDArray[np.bool_] = {
        "all": np.ones(len(users.cold), bool),
        "new": ~users.repeated,
        "repeated": users.repeated,
        "cold": users.cold,
        HIDDEN: is_hidden,
        OCCURRENCES: users.cold,
    }[targets]
    if not chosen.any():
        raise UserError(f"the {split} split has no target that is {targets}; leave --targets out")
    return chosen


def _group(records: Sequence[Record], by: str) -> list[System]:
    """Return the systems that the runs form, in the order of the runs."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(GROUPINGS[by](record), []).append(record)
    if len(groups) < 2:
        listed = ", ".join(record.name for record in records)
        problem = "is one run" if len(records) == 1 else f"are one system when grouped by {by}"
        raise UserError(f"{listed} {problem}; name another run to compare with")
    systems = []
    for members in groups.values():
        names = [record.name for record in members]
        label = GROUPINGS[by](members[0]) if by == "model" else names[0]
        label = f"{label} x{len(names)}" if len(names) > 1 else label
        settings = _changed(members[0], is_single=len(names) == 1)
        control = members[0].control
        systems.append(System(label=label, runs=names, settings=settings, control=control))
    return systems


def _changed(record: Record, *, is_single: bool) -> str:
    """Return the settings that are not the model's defaults.

    Runs of earlier versions have stored no such settings.
    """
    changed = record.about.get("changed", [])
    return ", ".join(text for text in changed if is_single or not text.startswith("seed="))


def _compare_metric(
    metric: str,
    seen: str,
    values: Mapping[str, Sequence[Mapping[str, Values]]],
    users: npt.NDArray[np.int32],
) -> list[SystemMetric]:
    """Compare all systems by one metric.

    Args:
        metric: Name of the metric.
        seen: ``filtered`` or ``kept``.
        values: Label of each system -> for each of its runs, metric -> (E,) values of the users.
        users: (E,) the users, ascending; those of ``cold-occurrences`` may have several values.
    """
    groups = users.astype(np.int64) if (np.diff(users) == 0).any() else None
    means = {
        label: np.mean([run[metric] for run in runs], axis=0) for label, runs in values.items()
    }
    reference = next(iter(values))
    lines = []
    for label, runs in values.items():
        run_means = [float(run[metric].mean()) for run in runs]
        is_reference = label == reference
        lines.append(
            SystemMetric(
                metric=metric,
                seen=seen,
                system=label,
                value=float(means[label].mean()),
                spread=float(np.std(run_means, ddof=1)) if len(run_means) > 1 else None,
                test=(
                    None
                    if is_reference
                    else paired_test(means[label], means[reference], groups=groups, samples=SIGNS)
                ),
            )
        )
    return lines


def _check_comparable(first: Record, record: Record) -> None:
    """Refuse a run whose users or items differ from those of the first run."""
    if record.pretraining:
        raise UserError(
            f"run {record.name!r} is a pre-training and does not rank items; compare runs that"
            f" start from it: mmrec train --model {record.about['model']} --init {record.name}"
        )
    dataset, first_dataset = record.about["dataset"], first.about["dataset"]
    if dataset != first_dataset:
        raise UserError(
            f"run {record.name!r} is of dataset {dataset!r}, run {first.name!r} of"
            f" {first_dataset!r}; compare runs of one dataset"
        )
    if not (record.folder / "predictions.parquet").exists():
        raise UserError(
            f"run {record.name!r} is not evaluated; run: mmrec eval --run {record.name}"
        )
    for key, value, first_value in (
        ("items", record.about["fingerprint"], first.about["fingerprint"]),
        ("interactions", *(r.identity.get("interactions") for r in (record, first))),
    ):
        if value != first_value:
            ties = (record.ties[1], first.ties[1])
            order = f"; ties ordered by {ties[0]}, not by {ties[1]}" if ties[0] != ties[1] else ""
            raise UserError(
                f"run {record.name!r} was trained on another preparation of {dataset!r} than run"
                f" {first.name!r} ({key} {value}, not {first_value}{order}); train one of them"
                " again"
            )


def _check_occurrences(records: Sequence[Record], split: str) -> None:
    """Refuse runs that have learned the occurrences of cold items."""
    if split != "test":
        raise UserError(f"--targets {OCCURRENCES} are of the split test, not {split}; leave it out")
    for record in records:
        if not record.settings.get("hold_out_cold"):
            raise UserError(
                f"run {record.name!r} has learned the occurrences of cold items at training"
                f" positions; give --targets cold, or train it with --set hold_out_cold=true"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Users:
    """The evaluated users of a split, in ascending order."""

    target: npt.NDArray[np.int32]
    """(E, 3) user, item, and length of the history."""
    cold: npt.NDArray[np.bool_]
    """(E,) whether the target is cold."""
    repeated: npt.NDArray[np.bool_]
    """(E,) whether the user already had the target."""


_Ranks = dict[str, dict[str, npt.NDArray[np.int64]]]
"""Run -> ``filtered`` or ``kept`` -> (E,) ranks."""


def _read_ranks(
    records: Sequence[Record], split: str, *, with_train: bool = False
) -> tuple[_Users, _Ranks]:
    """Read the ranks of every run; all runs must have the same users and targets.

    Args:
        records: The runs.
        split: ``test`` or ``validation``.
        with_train: Read the occurrences of cold items at training positions as well.
    """
    splits = [split, TRAIN] if with_train else [split]
    ranks: _Ranks = {}
    users: _Users | None = None
    for record in records:
        path = record.folder / "predictions.parquet"
        with read_errors(path, f"run: mmrec eval --run {record.name}"):
            table = read_predictions_table(path)
            table = table.filter(pc.field("split").isin(splits))
            table = table.sort_by([("user", "ascending"), ("history", "ascending")])
            filtered = table.column("rank_filtered")
            is_repeated = filtered.is_null().to_numpy()
            table = table.drop_columns("rank_filtered").append_column(
                "rank_filtered", filtered.cast(pa.int64()).fill_null(UNRANKED)
            )
            columns = {name: table.column(name).to_numpy() for name in table.column_names}
            ranks[record.name] = {seen: columns[f"rank_{seen}"].astype(np.int64) for seen in SEEN}
            columns["cold"] = columns["cold"].astype(np.bool_)
            for key in ("user", "item", "history"):
                columns[key] = columns[key].astype(np.int32)
        target = np.stack([columns[key] for key in ("user", "item", "history")], axis=1)
        if users is None:
            users = _Users(target=target, cold=columns["cold"], repeated=is_repeated)
        elif not np.array_equal(users.repeated, is_repeated):
            raise UserError(
                f"runs {records[0].name!r} and {record.name!r} were evaluated by versions that rank"
                " repeated targets differently; run mmrec eval --run NAME for both"
            )
        elif not np.array_equal(users.target, target):
            raise UserError(
                f"runs {records[0].name!r} and {record.name!r} were evaluated on other users or"
                " targets; run mmrec eval --run NAME for both"
            )
    assert users is not None
    return users, ranks
