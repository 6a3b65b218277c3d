"""``mmrec prepare --split time``: two dates divide the interactions of all users."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.dataset import Dataset, load_dataset
from features.errors import UserError
from features.sql_views import query
from features.warehouse import Warehouse
from tests.cli.invoke import run
from tests.pipeline.datasets.raws import ITEMS, prepared

HEADER = "user_id,item_id,timestamp\n"
# Days of March 2026. Validation is from the 10th, test from the 20th on.
ROWS = {
    "all": ["a 1", "b 2", "c 10", "a 15", "b 19", "c 20", "a 25"],
    "new": ["a 12", "b 13"],  # nothing before the first date: its second item is a target
    "late": ["a 30"],  # one item has no input
    "early": ["b 3", "c 4", "a 9"],
    "tested": ["c 5", "a 6", "b 21"],
}
TEXT = HEADER + "".join(
    f"{user},{row.split()[0]},2026-03-{int(row.split()[1]):02d}\n"
    for user, rows in ROWS.items()
    for row in rows
)
TIME: dict[str, Any] = {"split": "time", "valid_from": "2026-03-10", "test_from": "2026-03-20"}


def targets(dataset: Dataset, split: str) -> dict[int, tuple[int, int]]:
    """Return user -> (number of items of the input, target item)."""
    users = dataset.eval_split(split)
    rows = zip(users.users, users.starts, users.targets, strict=True)
    return {int(u): (int(t - s), int(dataset.items[t])) for u, s, t in rows}


def test_the_splits_by_hand(warehouse: Warehouse, tmp_path: Path) -> None:
    notes: list[str] = []
    content = {"interactions.csv": TEXT, "items.csv": ITEMS}
    prepared(warehouse, tmp_path / "raw", content, notify=notes.append, **TIME)
    (name,) = warehouse.datasets()
    table = query(warehouse, "SELECT user_id, split FROM splits ORDER BY user, position")
    rows = [(row["user_id"], row["split"]) for row in table.to_pylist()]
    found = {user: [s for u, s in rows if u == user] for user in ROWS}
    assert found == {
        "all": ["train", "train", "validation", "other", "other", "test", "other"],
        "new": ["other", "validation"],
        "late": ["other"],
        "early": ["train", "train", "train"],
        "tested": ["train", "train", "test"],
    }
    dataset = load_dataset(warehouse, name)
    ids = {user: number for number, user in enumerate(dict.fromkeys(u for u, _ in rows))}
    a, b, c = 0, 1, 2
    assert targets(dataset, "validation") == {ids["all"]: (2, c), ids["new"]: (1, b)}
    assert targets(dataset, "test") == {ids["all"]: (5, c), ids["tested"]: (2, b)}
    assert dataset.train_counts.tolist() == [3, 2, 2]  # of a, b, c before the 10th
    assert (a, b, c) == (0, 1, 2)
    assert any("7 interactions before 2026-03-10" in note and "2 users" in note for note in notes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"valid_from": None}, "--valid-from DATE"),
        ({"split": "leave-one-out"}, "--split time"),
        ({"valid_from": "2026-04-01"}, "is not before"),
        ({"test_from": "2026"}, "is not before .* 2026 .1975-07-20"),
        ({"test_from": "20270101"}, "no interaction with an earlier one is from 2027-01-01 on"),
        ({"valid_from": "soon"}, "'soon' is no date"),
        ({"valid_from": "2025-01-01", "test_from": "2025-02-01"}, "from 2026-03-01 to 2026-03-30"),
        ({"test_from": "2027-01-01"}, "no interaction with an earlier one is from 2027-01-01 on"),
        ({"split": "random"}, "leave-one-out"),
    ],
)
def test_dates_that_do_not_fit_are_refused(
    warehouse: Warehouse, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    content = {"interactions.csv": TEXT, "items.csv": ITEMS}
    with pytest.raises(UserError, match=words):
        prepared(warehouse, tmp_path / "raw", content, **{**TIME, **options})


def test_interactions_without_times_are_refused(warehouse: Warehouse, tmp_path: Path) -> None:
    content = {"interactions.csv": "user_id,item_id\nu,a\nu,b\nu,c\n", "items.csv": ITEMS}
    with pytest.raises(UserError, match="needs times"):
        prepared(warehouse, tmp_path / "raw", content, **TIME)


@pytest.mark.parametrize(
    ("unit", "factor"), [("seconds", 1), ("milliseconds", 10**3), ("microseconds", 10**6)]
)
def test_dates_have_the_unit_of_the_file(
    warehouse: Warehouse, tmp_path: Path, unit: str, factor: int
) -> None:
    day = 86_400 * factor
    begin = 20_522 * day  # 2026-03-10
    rows = "".join(
        f"u,{item},{begin + shift}\n" for item, shift in zip("abc", (-1, 0, day), strict=True)
    )
    info = prepared(
        warehouse, tmp_path / "raw", {"interactions.csv": HEADER + rows, "items.csv": ITEMS},
        split="time", valid_from="2026-03-10T01:00:00+01:00", test_from=str(begin + day),
    )  # fmt: skip
    assert (info.time_unit, info.valid_from, info.test_from) == (unit, begin, begin + day)


@settings(max_examples=8)  # each prepares a dataset
@given(
    histories=st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=8), min_size=1, max_size=6)
)
def test_no_interaction_from_the_first_date_on_is_learned(
    tmp_path_factory: pytest.TempPathFactory, histories: list[list[int]]
) -> None:
    histories = [*histories, [1, 12, 22]]  # no split is empty
    folder = tmp_path_factory.mktemp("time")
    warehouse = Warehouse(folder / "warehouse")
    warehouse.create()
    days = 20_512  # 2026-02-28
    lines = "".join(
        f"u{user},{'abc'[n % 3]},{(days + day) * 86_400}\n"
        for user, history in enumerate(histories)
        for n, day in enumerate(history)
    )
    content = {"interactions.csv": HEADER + lines, "items.csv": ITEMS}
    prepared(warehouse, folder / "raw", content, **TIME)
    dataset = load_dataset(warehouse, warehouse.datasets()[0], with_times=True)
    assert dataset.times is not None
    day_I = dataset.times // 86_400 - days
    trained = dataset.train_positions()
    assert sorted(day_I[trained].tolist()) == sorted(
        day for day in itertools.chain(*histories) if day < 10
    )
    for split, (first, last) in {"validation": (10, 20), "test": (20, 99)}.items():
        users = dataset.eval_split(split)
        assert ((day_I[users.targets] >= first) & (day_I[users.targets] < last)).all()
        assert (users.targets > users.starts).all()
        assert len(set(users.users)) == len(users.users)
        for start, target in zip(users.starts, users.targets, strict=True):
            between = day_I[start + 1 : target]
            assert not ((between >= first) & (between < last)).any()
    assert np.array_equal(dataset.train_counts, np.bincount(dataset.items[trained], minlength=3))


def test_a_run_belongs_to_its_split(warehouse: Warehouse, tmp_path: Path) -> None:
    content = {"interactions.csv": TEXT, "items.csv": ITEMS}
    prepared(warehouse, tmp_path / "raw", content, **TIME)
    (name,) = warehouse.datasets()
    by_time = load_dataset(warehouse, name).digest()
    prepared(warehouse, tmp_path / "raw", content)
    assert load_dataset(warehouse, name).digest() != by_time


def test_a_run_is_trained_and_evaluated_by_time(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    generator = np.random.default_rng(0)
    lines = "".join(
        f"u{user},{(start + n) % 12},2026-03-{n + 1 + int(generator.integers(12)):02d}\n"
        for user, start in enumerate(generator.integers(12, size=60))
        for n in range(0, 18, 2)
    )
    (raw / "interactions.csv").write_text(HEADER + lines)
    root = ("--warehouse", str(tmp_path / "warehouse"))
    dates = ("--valid-from", "2026-03-15", "--test-from", "2026-03-22")
    run("prepare", "--dataset", "w", "--format", "table", "--raw", str(raw), "--split", "time",
        *dates, *root)  # fmt: skip
    run("train", "--model", "sasrec", "--dataset", "w", "--name", "r", "--set", "epochs=1",
        "--set", "dim=8", "--set", "device=cpu", *root)  # fmt: skip
    printed = run("eval", "r", *root).output
    assert "training before 2026-03-15" in printed
    assert "leave-one-out" not in printed
