from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features import dataset
from features.atomic_files import write_table
from features.dataset import load_dataset, load_items, stream_items
from features.documents import write_json
from features.errors import UserError
from features.schema import INTERACTIONS_SCHEMA, ITEMS_SCHEMA
from features.sql_text import parquet_sql, quoted
from features.warehouse import DatasetInfo, Warehouse

HAND = [[3, 1, 2, 0], [1], [2, 2, 1], [0, 3]]


def _write(warehouse: Warehouse, sequences: Sequence[Sequence[int]], items: int) -> DatasetInfo:
    """The canonical tables of ``mine``, interactions in two parts, neither of them in order."""
    folder = warehouse.dataset_dir("mine")
    rows = [
        {"user": user, "user_id": f"u{user}", "item": item, "timestamp": None, "position": position}
        for user, sequence in enumerate(sequences)
        for position, item in enumerate(sequence)
    ][::-1]
    half = len(rows) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        table = pa.Table.from_pylist(part, INTERACTIONS_SCHEMA)
        write_table(folder / "interactions" / f"part-{number:05d}.parquet", table)
    catalogue = [
        {"item": item, "item_id": f"i{item}", "text": f"text {item}"} for item in range(items)
    ]
    write_table(
        folder / "items/part-00000.parquet", pa.Table.from_pylist(catalogue[::-1], ITEMS_SCHEMA)
    )
    info = DatasetInfo(
        name="mine",
        format="table",
        raw="nowhere",
        k_core=0,
        users=len(sequences),
        items=items,
        interactions=len(rows),
        fingerprint="f",
        inputs={},
        timestamps=False,
        tied=0.0,
    )
    write_json(folder / "dataset.json", asdict(info))
    return info


def test_a_dataset_by_hand(warehouse: Warehouse) -> None:
    _write(warehouse, HAND, 5)
    dataset = load_dataset(warehouse, "mine")
    assert dataset.items.tolist() == [3, 1, 2, 0, 1, 2, 2, 1, 0, 3]
    assert dataset.items.dtype == np.int32
    assert dataset.offsets.tolist() == [0, 4, 5, 8, 10]
    assert dataset.train_ends().tolist() == [2, 5, 6, 10]
    assert dataset.train_counts.tolist() == [1, 2, 1, 2, 0]
    assert dataset.cold.all()
    test, validation = dataset.eval_split("test"), dataset.eval_split("validation")
    assert test.users.tolist() == [0, 2]
    assert test.starts.tolist() == [0, 5]
    assert test.targets.tolist() == [3, 7]
    assert validation.targets.tolist() == [2, 6]


@pytest.mark.slow
@given(
    sequences=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=14), min_size=1, max_size=8)
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_arrays_equal_the_lists(warehouse: Warehouse, sequences: list[list[int]]) -> None:
    _write(warehouse, sequences, 6)
    dataset = load_dataset(warehouse, "mine")
    trained: Counter[int] = Counter()
    ends = dataset.train_ends()
    for user, sequence in enumerate(sequences):
        start, end = dataset.offsets[user : user + 2]
        assert dataset.items[start:end].tolist() == sequence
        train = sequence if len(sequence) < 3 else sequence[:-2]
        assert dataset.items[start : ends[user]].tolist() == train
        trained.update(train)
    assert dataset.train_counts.tolist() == [trained[item] for item in range(6)]
    assert dataset.cold.tolist() == [trained[item] < 10 for item in range(6)]
    evaluated = [user for user, sequence in enumerate(sequences) if len(sequence) >= 3]
    for split, back in (("validation", 2), ("test", 1)):
        held = dataset.eval_split(split)
        assert held.users.tolist() == evaluated
        for user, start, target in zip(held.users, held.starts, held.targets, strict=True):
            assert dataset.items[start:target].tolist() == sequences[user][:-back]
            assert dataset.items[target] == sequences[user][-back]


def test_items_come_in_their_order(warehouse: Warehouse) -> None:
    _write(warehouse, HAND, 4)
    table = load_items(warehouse, "mine", ["item_id", "text"])
    assert table.column_names == ["item_id", "text"]
    assert table["text"].to_pylist() == ["text 0", "text 1", "text 2", "text 3"]


@pytest.mark.parametrize("sizes", [(7,), (3, 4), (0, 7)])
@pytest.mark.parametrize("order", ["in order", "parts swapped", "rows swapped"])
def test_items_pass_by_in_their_order(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...], order: str
) -> None:
    info = _write(warehouse, [[0, 1, 2, 3, 4, 5, 6]], 7)
    folder = warehouse.dataset_dir(info.name) / "items"
    (old,) = folder.glob("*.parquet")
    whole = pq.read_table(old).sort_by("item")
    old.unlink()
    starts = np.cumsum([0, *sizes])
    parts = [whole.slice(start, size) for start, size in zip(starts, sizes, strict=False)]
    if order == "rows swapped":
        parts[-1] = parts[-1].take([1, 0, *range(2, sizes[-1])])
    names = range(len(parts))[:: -1 if order == "parts swapped" else 1]
    for name, part in zip(names, parts, strict=True):
        write_table(folder / f"part-{name}.parquet", part)
    if order == "in order":
        monkeypatch.delattr(dataset, "load_items")  # no need to hold them all
    batches = list(stream_items(warehouse, info.name, ["item_id"], rows=2))
    assert max(map(len, batches)) == 2
    found = [one for batch in batches for one in batch["item_id"].to_pylist()]
    assert found == whole["item_id"].to_pylist()


@pytest.mark.parametrize("change", [{"interactions": 11}, {"users": 3}])
def test_tables_that_contradict_their_description(
    warehouse: Warehouse, change: dict[str, int]
) -> None:
    info = _write(warehouse, HAND, 4)
    path = warehouse.dataset_dir("mine") / "dataset.json"
    write_json(path, asdict(replace(info, **change)))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="run mmrec prepare again"):
        load_dataset(warehouse, "mine")


def test_a_dataset_that_is_not_prepared(warehouse: Warehouse) -> None:
    _write(warehouse, HAND, 4)
    for load in (load_dataset, lambda warehouse, name: load_items(warehouse, name, ["text"])):
        with pytest.raises(UserError, match=r"'other' is not prepared .*prepared: mine"):
            load(warehouse, "other")


def test_quoting() -> None:
    assert quoted("it's") == "'it''s'"
    assert parquet_sql(Path("a'b")) == "read_parquet('a''b/*.parquet', hive_partitioning = false)"


def test_a_description_that_claims_more_users_is_refused(warehouse: Warehouse) -> None:
    info = _write(warehouse, HAND, 4)
    document = asdict(replace(info, users=info.users + 1))
    write_json(warehouse.dataset_dir("mine") / "dataset.json", document)
    with pytest.raises(UserError, match="hold 10 interactions of 4 users"):
        load_dataset(warehouse, "mine")
