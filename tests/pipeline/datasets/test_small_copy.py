"""Small copies of datasets: what they hold, and that they are equal each time."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from features.dataset import Dataset, load_dataset, load_items, load_user_ids
from features.store import FeatureStore
from features.warehouse import Warehouse
from pipeline.datasets.prepare import PrepareOptions, prepare_dataset
from pipeline.datasets.small_copy import INTERACTIONS, ITEMS, USERS, copy_small
from tests.trainer import worlds

N_ITEMS = 90


def histories(dataset: Dataset, warehouse: Warehouse) -> dict[str, list[str]]:
    """Return the id of each user to the ids of the items, oldest first."""
    items = load_items(warehouse, "world", ["item_id"]).column("item_id").to_pylist()
    users = load_user_ids(warehouse, "world").to_pylist()
    bounds = zip(dataset.offsets[:-1], dataset.offsets[1:], strict=True)
    return {
        user: [items[item] for item in dataset.items[begin:end]]
        for user, (begin, end) in zip(users, bounds, strict=True)
    }


def vectors(warehouse: Warehouse, modality: str) -> dict[str, list[float]]:
    """Return the id of each item with a vector to the vector."""
    info = warehouse.info("world")
    items = load_items(warehouse, "world", ["item_id"]).column("item_id").to_pylist()
    table = FeatureStore(warehouse).table("world", "toy", modality)
    matrix = table.read(info.items, info.fingerprint, info.inputs_of(modality))
    return {items[row]: matrix.vectors[row].tolist() for row in np.flatnonzero(matrix.present)}


def files(folder: Path) -> dict[str, str]:
    """Return the path of each file to a hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def write_world(warehouse: Warehouse, users: int, length: int, seed: int = 0) -> None:
    rng = np.random.default_rng(1)
    worlds.prepare(
        warehouse, [rng.integers(N_ITEMS, size=length).tolist() for _ in range(users)], N_ITEMS
    )
    for part in warehouse.root.glob("world/features/**/part-*.parquet"):
        part.unlink()
    worlds.extract(warehouse, worlds.features(N_ITEMS, seed=seed))


@pytest.mark.parametrize(("users", "length"), [(USERS + 50, INTERACTIONS + 7), (30, 5)])
def test_a_copy_has_the_last_interactions_of_a_few_users(
    warehouse: Warehouse, users: int, length: int
) -> None:
    write_world(warehouse, users, length)
    before = files(warehouse.root / "world")
    small = copy_small(warehouse, ["world"])
    whole = histories(load_dataset(warehouse, "world"), warehouse)
    part = histories(load_dataset(small, "world"), small)
    assert len(part) == min(users, USERS)
    assert all(items == whole[user][-INTERACTIONS:] for user, items in part.items())
    ids = load_items(small, "world", ["item_id"]).column("item_id").to_pylist()
    assert set(ids) == {item for items in part.values() for item in items}
    for modality in ("image", "text"):
        all_vectors = vectors(warehouse, modality)
        expected = {item: vector for item, vector in all_vectors.items() if item in set(ids)}
        assert vectors(small, modality) == expected
    assert files(warehouse.root / "world") == before
    assert warehouse.datasets() == ["world"]


def test_equal_datasets_give_equal_copies_and_tables_are_copied_once(warehouse: Warehouse) -> None:
    write_world(warehouse, USERS + 20, 9)
    small = copy_small(warehouse, ["world"])
    first = files(small.root)
    parts = sorted(small.root.glob("world/features/**/*.parquet"))
    times = [path.stat().st_mtime_ns for path in parts]
    assert files(copy_small(warehouse, ["world", "world"]).root) == first
    assert [path.stat().st_mtime_ns for path in parts] == times


@pytest.mark.parametrize("change", ["features", "interactions"])
def test_a_copy_follows_the_dataset(warehouse: Warehouse, change: str) -> None:
    write_world(warehouse, 40, 6)
    copy_small(warehouse, ["world"])
    if change == "features":
        write_world(warehouse, 40, 6, seed=5)
    else:
        write_world(warehouse, 25, 12)
    small = copy_small(warehouse, ["world"])
    assert load_dataset(small, "world").info.users == (40 if change == "features" else 25)
    expected = vectors(warehouse, "text")
    assert all(vector == expected[item] for item, vector in vectors(small, "text").items())


def test_a_dataset_without_users_is_cut_by_items(warehouse: Warehouse, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    lines = [f"v{i}\tcaption {i}" for i in range(ITEMS + 5)]
    (raw / "captions.tsv").write_text("item_id\tcaption\n" + "\n".join(lines) + "\n")
    options = PrepareOptions(dataset="world", raw=raw, format="captions")
    prepare_dataset(warehouse, options)
    small = copy_small(warehouse, ["world"])
    info = small.info("world")
    assert (info.users, info.interactions, info.items) == (0, 0, ITEMS)
    table = load_items(small, "world", ["item_id", "text"])
    for item, text in zip(*table.to_pydict().values(), strict=True):
        assert text == f"caption {item.removeprefix('v')}"
