"""``mmrec prepare --hide-items``: a sample of items is test targets only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from features.dataset import load_dataset
from features.errors import UserError
from features.warehouse import Warehouse
from tests.pipeline.datasets.raws import ITEMS, items_of, prepared, sequences_of

Row = tuple[int, int, int]  # user, item, time
HEADER = "user_id,item_id,timestamp\n"
TEST_FROM = 20
TIME: dict[str, Any] = {"split": "time", "valid_from": "10", "test_from": str(TEST_FROM)}


def text_of(rows: list[Row]) -> str:
    return HEADER + "".join(f"u{user},i{item},{time}\n" for user, item, time in rows)


def histories_of(rows: list[Row]) -> dict[str, list[tuple[str, int]]]:
    """Return the items and times of each user, oldest first, equal times in the order of rows."""
    histories: dict[str, list[tuple[str, int]]] = {}
    for user, item, time in sorted(rows, key=lambda row: row[2]):
        histories.setdefault(f"u{user}", []).append((f"i{item}", time))
    return histories


def last_position(history: list[tuple[str, int]], hidden: set[str]) -> int | None:
    """Return the position of the target of leave-one-out if the protocol can have it."""
    others = [item for item, _ in history[:-1] if item not in hidden]
    return len(history) - 1 if len(others) >= 2 else None


def first_test_position(history: list[tuple[str, int]], hidden: set[str]) -> int | None:
    """Return the position of the target of a split by time if it has an input."""
    before = [item for item, time in history if time < TEST_FROM and item not in hidden]
    in_test = [position for position, (_, time) in enumerate(history) if time >= TEST_FROM]
    return in_test[0] if in_test and before else None


Target = Callable[[list[tuple[str, int]], set[str]], int | None]


def reference(rows: list[Row], hidden: set[str], target: Target) -> dict[str, list[str]]:
    """Return the sequences of the protocol, one interaction at a time."""
    sequences: dict[str, list[str]] = {}
    for user, history in histories_of(rows).items():
        kept = target(history, hidden)
        for position, (item, _) in enumerate(history):
            if item not in hidden or position == kept:
                sequences.setdefault(user, []).append(item)
    return sequences


def hidden_of(warehouse: Warehouse) -> set[str]:
    info = warehouse.info("mine")
    ids = [row["item_id"] for row in items_of(warehouse)]
    shown = ids[: info.items - info.hidden_items]
    assert shown == sorted(shown)
    return set(ids[info.items - info.hidden_items :])


def random_rows(seed: int) -> list[Row]:
    """Return the interactions of 150 users with 1 to 12 of 20 items, with equal times."""
    rng = np.random.default_rng(seed)
    rows = [
        (user, int(rng.integers(20)), int(rng.integers(1, 29)))
        for user in range(150)
        for _ in range(rng.integers(1, 13))
    ]
    rng.shuffle(rows)
    return [(user, item, time) for user, item, time in rows]


@pytest.mark.parametrize(
    ("options", "target"), [({}, last_position), (TIME, first_test_position)], ids=["last", "time"]
)
@pytest.mark.parametrize(("share", "seed"), [(0.1, 0), (0.5, 1), (0.8, 2)])
def test_the_sequences_are_those_of_a_reference(
    warehouse: Warehouse,
    tmp_path: Path,
    options: dict[str, Any],
    target: Target,
    share: float,
    seed: int,
) -> None:
    rows = random_rows(seed)
    content = {"interactions.csv": text_of(rows)}
    info = prepared(warehouse, tmp_path / "raw", content, hide_items=share, seed=seed, **options)
    hidden = hidden_of(warehouse)
    assert len(hidden) == info.hidden_items == round(share * 20)
    assert sequences_of(warehouse) == reference(rows, hidden, target)
    dataset = load_dataset(warehouse, "mine")
    assert dataset.hidden.sum() == len(hidden)
    assert not dataset.train_counts[dataset.hidden].any()
    # An interaction with a hidden item is a test target, and so in no input of a target.
    positions = np.flatnonzero(dataset.hidden[dataset.items])
    tests = dataset.eval_split("test")
    assert len(positions)
    assert np.isin(positions, tests.targets).all()
    for split in ("validation", "test"):
        users = dataset.eval_split(split)
        for start, end in zip(users.starts, users.targets, strict=True):
            assert not dataset.hidden[dataset.items[start:end]].any()


@pytest.fixture
def rows() -> list[Row]:
    rng = np.random.default_rng(0)
    return [(int(u), int(i), t) for t, (u, i) in enumerate(rng.integers(0, 30, (600, 2)), 1)]


def test_test_targets_are_those_without_hidden_items(
    warehouse: Warehouse, tmp_path: Path, rows: list[Row]
) -> None:
    content = {"interactions.csv": text_of(rows)}
    prepared(warehouse, tmp_path / "raw", content)
    plain = {user: items[-1] for user, items in sequences_of(warehouse).items()}
    notes: list[str] = []
    info = prepared(
        warehouse, tmp_path / "raw", content, hide_items=0.2, seed=1, notify=notes.append
    )
    hidden = hidden_of(warehouse)
    assert {user: items[-1] for user, items in sequences_of(warehouse).items()} == plain
    targets = sum(item in hidden for item in plain.values())
    dropped = sum(f"i{item}" in hidden for _, item, _ in rows) - targets
    assert targets > 0
    assert (info.hidden_items, info.seed, info.interactions) == (6, 1, 600 - dropped)
    assert (
        f"6 hidden items of 30 (seed 1): {targets} of their interactions are test targets,"
        f" {dropped} are dropped" in notes
    )


def test_the_sample_depends_on_the_ids_and_the_seed_alone(
    warehouse: Warehouse, tmp_path: Path, rows: list[Row]
) -> None:
    samples = []
    for number, (order, seed) in enumerate(((1, 1), (-1, 1), (1, 2))):
        content = {"interactions.csv": text_of(rows[::order])}
        prepared(warehouse, tmp_path / f"raw{number}", content, hide_items=0.2, seed=seed)
        samples.append(hidden_of(warehouse))
    assert samples[0] == samples[1]
    assert samples[0] != samples[2]


def test_users_of_hidden_items_alone_are_left_out(warehouse: Warehouse, tmp_path: Path) -> None:
    rows = [(user, item, time) for user in range(10) for time, item in enumerate([user] * 3, 1)]
    notes: list[str] = []
    content = {"interactions.csv": text_of(rows)}
    info = prepared(warehouse, tmp_path / "raw", content, hide_items=0.3, notify=notes.append)
    assert (info.users, info.items, info.hidden_items) == (7, 10, 3)
    assert any(note.endswith("3 users without other items left out") for note in notes)


def test_the_core_comes_first_and_keeps_the_hidden_items(
    warehouse: Warehouse, tmp_path: Path, rows: list[Row]
) -> None:
    content = {"interactions.csv": text_of([*rows, (1, 99, 1)])}
    info = prepared(warehouse, tmp_path / "raw", content, hide_items=0.2, k_core=5)
    assert info.items == 30
    assert len(hidden_of(warehouse)) == 6


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_share_outside_of_0_to_1_is_refused(
    warehouse: Warehouse, tmp_path: Path, share: float
) -> None:
    with pytest.raises(UserError, match=r"--hide-items .* such as 0.1"):
        prepared(warehouse, tmp_path / "raw", {"interactions.csv": HEADER}, hide_items=share)


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_share_that_hides_none_or_all_is_refused(
    warehouse: Warehouse, tmp_path: Path, share: float
) -> None:
    content = {"interactions.csv": "user_id,item_id,timestamp\nu,a,1\nu,b,2\n", "items.csv": ITEMS}
    with pytest.raises(UserError, match="of 2 items with interactions"):
        prepared(warehouse, tmp_path / "raw", content, hide_items=share)
