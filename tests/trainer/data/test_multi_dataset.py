"""Several datasets as one: items and users side by side, one space of features."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from features.documents import write_json
from features.errors import UserError
from features.store import FeatureStore
from features.warehouse import Warehouse
from tests.trainer import worlds
from trainer.data import feature_tables
from trainer.data.batches import ItemFeatures
from trainer.data.multi_dataset import (
    ConcatenatedTokens,
    _concatenate,
    choose_common_tables,
    identify_data,
    item_splits,
    load_data,
)
from trainer.data.token_features import TokenFeatures


def test_joined_by_hand() -> None:
    first = worlds.dataset([[0, 1, 2, 0], [1, 2]], 3)
    second = worlds.dataset([[1, 0, 1, 1, 0]], 2)
    both = _concatenate([first, second])
    assert both.items.tolist() == [0, 1, 2, 0, 1, 2, 4, 3, 4, 4, 3]
    assert both.items.dtype == np.int32
    assert both.offsets.tolist() == [0, 4, 6, 11]
    assert both.train_counts.tolist() == [*first.train_counts, *second.train_counts]
    assert (both.info.name, both.info.users, both.info.items) == ("world+world", 3, 5)
    assert both.info.interactions == 11
    assert both.eval_split("test").targets.tolist() == [3, 10]


@pytest.fixture
def warehouse(warehouse: Warehouse) -> Warehouse:
    """Two datasets of one backbone, ``a`` and ``b``."""
    for name, n_items in (("a", 12), ("b", 9)):
        worlds.prepare(warehouse, [[i % n_items for i in range(5)]] * 3, n_items)
        worlds.extract(warehouse, worlds.features(n_items))
        folder = warehouse.dataset_dir("world")
        info = replace(
            worlds.dataset([[i % n_items for i in range(5)]] * 3, n_items).info, name=name
        )
        write_json(folder / "dataset.json", asdict(info))
        folder.rename(warehouse.dataset_dir(name))
    return warehouse


def test_loaded_side_by_side(warehouse: Warehouse) -> None:
    cpu = torch.device("cpu")
    labels = [table.label for table in choose_common_tables(warehouse, ["a", "b"], None)]
    assert labels == ["image=toy", "text=toy"]
    source = load_data(warehouse, ["a", "b"], labels, cpu)
    parts = [load_data(warehouse, [name], labels, cpu).features for name in ("a", "b")]
    assert source.features.n_items == 21
    for name in ("image", "text"):
        for kind in ("vectors", "present"):
            expected = torch.cat([getattr(part, kind)[name] for part in parts])
            assert torch.equal(getattr(source.features, kind)[name], expected)
    assert source.identity == identify_data(warehouse, ["a", "b"], labels)
    assert [table["content"].count("+") for table in source.identity.features] == [1, 1]


def test_other_backbones_are_refused(warehouse: Warehouse) -> None:
    features = worlds.features(9)
    (warehouse.dataset_dir("b") / "features" / "toy").rename(
        warehouse.dataset_dir("b") / "features" / "other"
    )
    with pytest.raises(UserError, match=r"'a' \(image=toy, text=toy\) and 'b' \(image=o"):
        choose_common_tables(warehouse, ["a", "b"], None)
    warehouse.dataset_dir("b").rename(warehouse.dataset_dir("world"))
    for part in warehouse.dataset_dir("world").glob("features/other/*/pooled/*"):
        part.unlink()
    wide = {**features.vectors, "text": torch.randn(9, 7)}
    worlds.extract(warehouse, ItemFeatures(n_items=9, vectors=wide, present=features.present))
    warehouse.dataset_dir("world").rename(warehouse.dataset_dir("b"))
    with pytest.raises(UserError, match=r"text .*'a' and 'b' .*dim 5 and 7"):
        load_data(warehouse, ["a", "b"], ["image=toy", "text=toy"], torch.device("cpu"))


def test_items_are_held_out_by_their_ids(warehouse: Warehouse) -> None:
    alone = {name: item_splits(warehouse, [name], 0.3) for name in ("a", "b")}
    both = item_splits(warehouse, ["a", "b"], 0.3)
    for split in ("validation", "test"):
        expected = np.concatenate([alone["a"][split], alone["b"][split]])
        assert np.array_equal(both[split], expected)
        # Both number their items i0, i1, ...: the same ids have the same fate.
        assert np.array_equal(alone["a"][split][:9], alone["b"][split])
        assert 0 < both[split].sum() < 21
    assert not (both["validation"] & both["test"]).any()


def test_joined_tokens_are_those_of_each_table() -> None:
    rng = np.random.default_rng(0)
    cpu = torch.device("cpu")
    parts = []
    for lengths in ([2, 0, 3], [1, 4]):
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        values = rng.standard_normal((int(offsets[-1]), 3)).astype(np.float16)
        parts.append(TokenFeatures(values=values, offsets=offsets, device=cpu))
    single = TokenFeatures(
        values=np.concatenate([part.values for part in parts]),
        offsets=np.array([0, 2, 2, 5, 6, 10]),
        device=cpu,
    )
    joined = ConcatenatedTokens(parts)
    assert (joined.width, joined.longest) == (single.width, single.longest)
    assert torch.equal(joined.present_N, single.present_N)
    for items in ([4, 0, 3], [1], [2, 2, 4], [3]):
        for mine, theirs in zip(
            joined.gather(torch.tensor(items)), single.gather(torch.tensor(items)), strict=True
        ):
            assert torch.equal(mine, theirs)


def test_features_on_disk_are_those_in_memory(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    worlds.prepare(warehouse, [[0, 1, 2, 3, 4, 5]], 8)
    worlds.extract(warehouse, worlds.features(8))
    tables = feature_tables.choose_tables(FeatureStore(warehouse), "world", None)
    info, cpu = warehouse.info("world"), torch.device("cpu")
    in_memory, _ = feature_tables.load_features(tables, info, cpu)
    monkeypatch.setattr(feature_tables, "available_memory", lambda: 0)
    on_disk, _ = feature_tables.load_features(tables, info, cpu)
    items = torch.tensor([3, 0, 7])
    assert list(warehouse.root.rglob("pooled-*.npy"))
    for name in in_memory.vectors:
        assert torch.equal(on_disk.rows(name, items), in_memory.rows(name, items))
        assert torch.equal(on_disk.present[name], in_memory.present[name])
