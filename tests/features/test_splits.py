from collections import Counter
from collections.abc import Sequence
from typing import Any

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.splits import COLD_BELOW, cold_sql, split_sql, train_counts_sql

Sequences = Sequence[Sequence[int]]
"""Item indices of user 0, 1, ..., oldest first."""


def _tables(db: duckdb.DuckDBPyConnection, sequences: Sequences, items: int) -> None:
    rows = [
        f"({user}, {item}, {position})"
        for user, sequence in enumerate(sequences)
        for position, item in enumerate(sequence)
    ]
    db.execute(
        f"CREATE TABLE interactions AS SELECT * FROM (VALUES {', '.join(rows)})"
        " t(user, item, position) ORDER BY hash(user, position)"  # no order may be relied on
    )
    db.execute(f"CREATE TABLE items AS SELECT range::INTEGER AS item FROM range({items})")


def _parts(sequence: Sequence[int]) -> list[str]:
    """The split of every position, by hand."""
    if len(sequence) < 3:
        return ["train"] * len(sequence)
    return ["train"] * (len(sequence) - 2) + ["validation", "test"]


def _ask(sequences: Sequences, items: int, sql: str) -> list[tuple[Any, ...]]:
    with duckdb.connect(config={"threads": 1}) as db:
        _tables(db, sequences, items)
        return db.sql(sql).fetchall()


_SEQUENCES = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=30), min_size=1, max_size=6)


@pytest.mark.slow
@given(sequences=_SEQUENCES)
@settings(max_examples=40, deadline=None)
def test_the_last_is_test_and_the_one_before_validation(sequences: Sequences) -> None:
    rows = _ask(sequences, 5, f"SELECT user, position, split FROM ({split_sql('interactions')})")
    assert sorted(rows) == [
        (user, position, part)
        for user, sequence in enumerate(sequences)
        for position, part in enumerate(_parts(sequence))
    ]


@pytest.mark.parametrize(
    ("length", "parts"),
    [
        (1, ["train"]),
        (2, ["train", "train"]),
        (3, ["train", "validation", "test"]),
        (4, ["train", "train", "validation", "test"]),
    ],
)
def test_users_of_less_than_three_are_only_trained_on(length: int, parts: list[str]) -> None:
    sql = f"SELECT split FROM ({split_sql('interactions')}) ORDER BY position"
    assert [row[0] for row in _ask([[0] * length], 1, sql)] == parts


@pytest.mark.slow
@given(sequences=_SEQUENCES)
@settings(max_examples=40, deadline=None)
def test_cold_items_and_their_held_out_interactions(sequences: Sequences) -> None:
    trained: Counter[int] = Counter()
    for sequence in sequences:
        trained.update(sequence if len(sequence) < 3 else sequence[:-2])
    sql = train_counts_sql("interactions", "items")
    assert dict(_ask(sequences, 7, sql)) == {item: trained[item] for item in range(7)}
    rows = _ask(sequences, 7, cold_sql("interactions", "items"))
    assert sorted(rows) == sorted(
        (user, item, position, part)
        for user, sequence in enumerate(sequences)
        for position, (item, part) in enumerate(zip(sequence, _parts(sequence), strict=True))
        if part != "train" and trained[item] < COLD_BELOW
    )


def test_ten_training_interactions_are_not_cold() -> None:
    # Item 0: ten times in training; item 1: nine times, and often held out, which must not count.
    sequences = [[0] * 5 + [1] * 2, [0] * 5 + [1] * 2, [1] * 11]
    counts = dict(_ask(sequences, 3, train_counts_sql("interactions", "items")))
    assert counts == {0: 10, 1: 9, 2: 0}
    cold = _ask(sequences, 3, cold_sql("interactions", "items"))
    assert sorted(cold) == [
        (0, 1, 5, "validation"), (0, 1, 6, "test"), (1, 1, 5, "validation"), (1, 1, 6, "test"),
        (2, 1, 9, "validation"), (2, 1, 10, "test"),
    ]  # fmt: skip
