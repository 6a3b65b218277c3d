"""The rows of feature tables under a control: which move, which stay, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from features.errors import UserError
from features.permutation import permuted_items
from features.store import FeatureStore
from features.warehouse import Warehouse
from tests.trainer import worlds
from trainer.data import feature_tables
from trainer.data.batches import ItemFeatures
from trainer.data.control import Control, fill_gaussian

N = 12
CPU = torch.device("cpu")


@pytest.fixture
def world(warehouse: Warehouse) -> Warehouse:
    worlds.prepare(warehouse, [[0, 1, 2, 3, 4, 5]], N)
    worlds.extract(warehouse, worlds.features(N))
    return warehouse


def load(warehouse: Warehouse, control: Control, *labels: str) -> ItemFeatures:
    tables = feature_tables.choose_tables(FeatureStore(warehouse), "world", labels or None)
    return feature_tables.load_features(tables, warehouse.info("world"), CPU, control)[0]


def mapped_files(warehouse: Warehouse) -> list[Path]:
    return list(warehouse.root.rglob("pooled.permuted-*.npy"))


def test_a_permutation_moves_every_row_among_those_that_exist() -> None:
    present_N = np.arange(20) % 3 != 0
    place_N = permuted_items(present_N, 1, "text=a")
    assert sorted(place_N.tolist()) == list(range(20))
    assert ((place_N == np.arange(20)) == ~present_N).all()
    assert (permuted_items(present_N, 1, "text=a") == place_N).all()
    assert (permuted_items(present_N, 2, "text=a") != place_N).any()
    assert (permuted_items(present_N, 1, "text=b") != place_N).any()
    assert permuted_items(np.eye(3, dtype=bool)[1], 1, "text=a").tolist() == [0, 1, 2]


def test_permuted_tables_hold_the_same_rows_for_the_same_items(
    world: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, permuted = load(world, Control()), load(world, Control(kind="permute", seed=3))
    places = {}
    for name, vectors_ND in real.vectors.items():
        present_N = real.present[name]
        places[name] = permuted_items(present_N.numpy(), 3, f"{name}=toy")
        assert torch.equal(permuted.present[name], present_N)
        assert torch.equal(permuted.vectors[name][places[name]], vectors_ND)
        assert not torch.equal(permuted.vectors[name], vectors_ND)
    both_N = (real.present["image"] & real.present["text"]).numpy()
    assert (places["image"] != places["text"])[both_N].any()
    monkeypatch.setattr(feature_tables, "available_memory", lambda: 0)
    on_disk = load(world, Control(kind="permute", seed=3))
    for name, vectors_ND in permuted.vectors.items():
        assert torch.equal(on_disk.vectors[name], vectors_ND)
    files = mapped_files(world)
    load(world, Control(kind="permute", seed=4))
    assert len(files) == len(mapped_files(world)) == 2
    assert not {*files} & {*mapped_files(world)}, "the file of another seed is removed"
    for name, vectors_ND in load(world, Control()).vectors.items():
        assert torch.equal(vectors_ND, real.vectors[name])


def test_permuted_tokens_stay_together(warehouse: Warehouse) -> None:
    worlds.prepare(warehouse, [[0, 1, 2, 3, 4, 5]], 6)
    rng = np.random.default_rng(0)
    tokens = {item: rng.normal(size=(item, 4)).astype(np.float32) for item in (1, 2, 3, 5)}
    worlds.extract_tokens(warehouse, "text", tokens)
    permuted = load(warehouse, Control(kind="permute", seed=1), "text:tokens")
    assert permuted.present["text"].tolist() == [False, True, True, True, False, True]
    place_N = permuted_items(permuted.present["text"].numpy(), 1, "text=toy:tokens")
    x_KTD, mask_KT = permuted.tokens["text"].gather(torch.from_numpy(place_N))
    for item in range(6):
        expected = torch.from_numpy(tokens.get(item, np.zeros((0, 4), np.float32)))
        assert torch.equal(x_KTD[item][mask_KT[item]], expected)
    with pytest.raises(UserError, match=r"control=random .*text=toy:tokens holds tokens"):
        load(warehouse, Control(kind="random"), "text:tokens")


def test_random_rows_have_the_mean_and_the_covariance_of_the_table() -> None:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(3, 3))
    vectors_ND = (rng.exponential(size=(40_000, 3)) @ mixing + 2).astype(np.float32)
    present_N = np.arange(len(vectors_ND)) % 4 != 0
    vectors_ND[~present_N] = 0
    before = vectors_ND.copy()
    fill_gaussian(vectors_ND, present_N, np.random.default_rng(1))
    assert not vectors_ND[~present_N].any()
    rows, real = vectors_ND[present_N], before[present_N]
    assert (rows != real).any(1).all()
    assert rows.mean(0) == pytest.approx(real.mean(0), abs=0.1)
    assert np.cov(rows.T) == pytest.approx(np.cov(real.T), abs=0.2)
    skewness = ((rows - rows.mean(0)) ** 3).mean(0) / rows.std(0) ** 3
    assert skewness == pytest.approx(0, abs=0.1)


def test_random_rows_follow_the_seed_and_need_the_table_in_memory(
    world: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, first = load(world, Control()), load(world, Control(kind="random", seed=1))
    second = load(world, Control(kind="random", seed=1))
    other = load(world, Control(kind="random", seed=2))
    for name, vectors_ND in first.vectors.items():
        assert torch.equal(first.present[name], real.present[name])
        assert torch.equal(vectors_ND, second.vectors[name])
        assert not torch.equal(vectors_ND, other.vectors[name])
    monkeypatch.setattr(feature_tables, "available_memory", lambda: 0)
    with pytest.raises(UserError, match=r"image=toy takes more than a quarter .*control=permute"):
        load(world, Control(kind="random", seed=1))
