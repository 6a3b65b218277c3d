"""Runs side by side: their metrics over the same users, and whether the difference is luck.

Each run's ``predictions.parquet`` holds the rank of every user's target, so two runs are compared
user by user. The sample are the users: several runs that differ in their seed can stand as one
system, the mean of each user's values over them, and their spread is told beside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from features.atomic_files import read_errors
from features.errors import UserError, unknown
from features.result_tables import read_predictions_table
from features.warehouse import Warehouse
from retrieval.metrics import METRIC_NAMES, per_user
from retrieval.significance import PairedTest, paired_test
from trainer.runs.read import Record, read_records

SPLITS = ("validation", "test")
TARGETS = ("all", "cold")
SEEN = ("filtered", "kept")
SIGNS = 10_000
"""Random signs of a paired test."""
SHOWN = ("HR@10", "HR@50", "NDCG@10", "NDCG@50", "MRR")

Values = npt.NDArray[np.float64]


def _settings(record: Record) -> str:
    """All that decides a run but its seed."""
    settings = {key: value for key, value in record.settings.items() if key != "seed"}
    init = record.about.get("init", {})
    return repr((record.about["model"], record.about["features"], sorted(settings.items()), init))


GROUPINGS: dict[str, Callable[[Record], str]] = {
    "run": lambda record: record.name,
    "model": lambda record: str(record.about["model"]),
    "settings": _settings,
}
"""What makes runs one system: themselves, their model, or all but the seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """What stands in the comparison as one."""

    label: str
    runs: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One system's value of one metric, and how far it is from the first system's."""

    metric: str
    seen: str
    system: str
    value: float
    spread: float | None
    """Standard deviation over the system's runs; nothing of one run."""
    test: PairedTest | None
    """System minus the first one; nothing for that one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What ``mmrec compare`` prints."""

    dataset: str
    split: str
    targets: str
    users: int
    systems: list[System]
    lines: list[Line]


def compare(
    warehouse: Warehouse,
    names: Sequence[str],
    *,
    split: str = "test",
    targets: str = "all",
    metrics: Sequence[str] = SHOWN,
    by: str = "run",
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Comparison:
    """Compare evaluated runs of one preparation, user by user.

    Args:
        warehouse: Holds the runs.
        names: The runs; what the first one belongs to is what the others are compared with.
        split: ``test`` or ``validation``.
        targets: ``all``, or ``cold``: users whose target has fewer than 10 training interactions.
        metrics: Names such as ``NDCG@10``.
        by: A name in ``GROUPINGS``.
        on_stage: Told what is being done.

    Raises:
        UserError: A run is not known, not evaluated, or not of the same data as the first one.
    """
    for kind, value, known in (
        ("split", split, SPLITS), ("targets", targets, TARGETS), ("grouping", by, GROUPINGS),
        *(("metric", metric, METRIC_NAMES) for metric in metrics),
    ):  # fmt: skip
        if value not in known:
            raise unknown(kind, value, list(known))
    records = read_records(warehouse, names)
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(GROUPINGS[by](record), []).append(record)
    if len(groups) < 2:
        what = "is one run" if len(records) == 1 else f"are one system, taken by {by}"
        raise UserError(f"{', '.join(names)} {what}; name another run to compare with")
    for record in records:
        _check(records[0], record)
    users, ranks = _aligned(records, split)
    chosen = np.ones(len(users.cold), bool) if targets == "all" else users.cold
    if not chosen.any():
        raise UserError(f"the {split} split has no target that is {targets}; leave --targets out")
    systems = [_system(by, members) for members in groups.values()]
    lines = []
    for seen in SEEN:
        values = [
            [
                {m: v for m, v in per_user(ranks[r.name][seen][chosen]).items() if m in metrics}
                for r in members
            ]
            for members in groups.values()
        ]
        for metric in dict.fromkeys(metrics):
            on_stage(f"paired tests of {metric}, {seen}")
            means = [np.mean([found[metric] for found in held], axis=0) for held in values]
            for system, held, mean in zip(systems, values, means, strict=True):
                over = [float(found[metric].mean()) for found in held]
                first = system is systems[0]
                lines.append(
                    Line(
                        metric=metric,
                        seen=seen,
                        system=system.label,
                        value=float(mean.mean()),
                        spread=float(np.std(over, ddof=1)) if len(over) > 1 else None,
                        test=None if first else paired_test(mean, means[0], samples=SIGNS),
                    )
                )
    return Comparison(
        dataset=records[0].about["dataset"],
        split=split,
        targets=targets,
        users=int(chosen.sum()),
        systems=systems,
        lines=lines,
    )


def _system(by: str, members: Sequence[Record]) -> System:
    names = [record.name for record in members]
    label = str(members[0].about["model"]) if by == "model" else names[0]
    return System(label=f"{label} x{len(names)}" if len(names) > 1 else label, runs=names)


def _check(first: Record, record: Record) -> None:
    """Refuse a run that cannot be compared with the first one, and say what can be done."""
    if record.pretraining:
        raise UserError(
            f"run {record.name!r} is a pre-training and recommends nothing; compare runs that"
            f" start from it: mmrec train --model {record.about['model']} --init {record.name}"
        )
    here, there = record.about["dataset"], first.about["dataset"]
    if here != there:
        raise UserError(
            f"run {record.name!r} is of dataset {here!r}, run {first.name!r} of {there!r};"
            " compare runs of one dataset"
        )
    if not (record.folder / "predictions.parquet").exists():
        raise UserError(
            f"run {record.name!r} is not evaluated; run: mmrec eval --run {record.name}"
        )
    for key, held, other in (
        ("items", record.about["fingerprint"], first.about["fingerprint"]),
        ("interactions", *(r.identity.get("interactions") for r in (record, first))),
    ):
        if held != other:
            raise UserError(
                f"run {record.name!r} was trained on another preparation of {here!r} than run"
                f" {first.name!r} ({key} {held}, not {other}); train one of them again"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Users:
    """The evaluated users of a split, in ascending order."""

    target: npt.NDArray[np.int32]
    """(E, 3) user, item and history length."""
    cold: npt.NDArray[np.bool_]
    """(E,)."""


_Ranks = dict[str, dict[str, npt.NDArray[np.int64]]]


def _aligned(records: Sequence[Record], split: str) -> tuple[_Users, _Ranks]:
    """Read every run's ranks of a split: name -> ``filtered`` | ``kept`` -> (E,)."""
    ranks: _Ranks = {}
    users: _Users | None = None
    for record in records:
        path = record.folder / "predictions.parquet"
        with read_errors(path, f"run: mmrec eval --run {record.name}"):
            table = read_predictions_table(path)
            table = table.filter(pc.field("split") == split).sort_by("user")
            columns = {name: table.column(name).to_numpy() for name in table.column_names}
        found = np.stack([columns[key] for key in ("user", "item", "history")], axis=1)
        if users is None:
            users = _Users(target=found, cold=columns["cold"])
        elif not np.array_equal(users.target, found):
            raise UserError(
                f"runs {records[0].name!r} and {record.name!r} were evaluated on other users or"
                f" targets; run mmrec eval --run NAME for both"
            )
        ranks[record.name] = {seen: columns[f"rank_{seen}"].astype(np.int64) for seen in SEEN}
    assert users is not None
    return users, ranks
