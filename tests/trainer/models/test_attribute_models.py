"""FDSA and S3-Rec: attributes as fields, and the losses against their equations."""

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from features.atomic_files import write_table
from features.dataset import Dataset
from features.errors import UserError
from features.schema import ITEMS_SCHEMA
from features.warehouse import Warehouse
from tests.trainer import worlds
from trainer.data.batches import ItemFeatures, Sequences, Shard
from trainer.losses.s3rec import attribute_loss, ranking_loss
from trainer.models.base import Catalogue
from trainer.models.registry import MODELS
from trainer.runs.train import train_run

N, A = 12, 7
ATTRIBUTES = {"attributes": "genre,brand"}
GENRES, SIZE = 6, 20
"""Number of genres, and items of a genre, in the world with scarce interactions."""


def features() -> ItemFeatures:
    """Feature vectors, and attributes in two columns; the last item has none."""
    rng = np.random.default_rng(0)
    genre = np.full((N, 3), -1)
    for item in range(N - 1):
        chosen = np.sort(rng.choice(4, rng.integers(1, 4), replace=False))
        genre[item, : len(chosen)] = chosen
    brand = np.where(np.arange(N) % 2 == 0, 4 + np.arange(N) % 3, -1)[:, None]
    brand[-1] = -1
    base = worlds.features(N)
    tables = {"genre": torch.from_numpy(genre), "brand": torch.from_numpy(brand)}
    return ItemFeatures(n_items=N, vectors=base.vectors, present=base.present, attributes=tables)


def build(model: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    catalogue = Catalogue(n_items=N, n_users=4, widths=features().widths, n_attributes=A)
    return MODELS.find(model).load()(worlds.small_settings(model, **settings), catalogue)


def sequences(rows: list[list[int]]) -> Sequences:
    width = max(map(len, rows))
    items = [row + [0] * (width - len(row)) for row in rows]
    return Sequences(
        items_BL=torch.tensor(items), lengths_B=torch.tensor([len(row) for row in rows])
    )


def attributes_of(item: int) -> list[int]:
    tables = features().attributes.values()
    return [int(index) for table in tables for index in table[item] if index >= 0]


@pytest.mark.parametrize("fields", ["features", "attributes", "both"])
def test_the_fields_of_an_item_by_the_equations(fields: str) -> None:
    """Eq. 2 and 3: w = softmax over fields of the attention, and the sum of w_f F_f."""
    world = features()
    model = build("fdsa", fields=fields, **ATTRIBUTES).double().eval()
    world = ItemFeatures(
        n_items=N,
        vectors={name: x.double() for name, x in world.vectors.items()},
        present=world.present,
        attributes=world.attributes,
    )
    vectors_ND = model.item_features(torch.arange(N), world)
    for item in range(N):
        existing = []
        if fields != "attributes":
            existing += [
                model.projections[name](world.vectors[name][item])
                for name in ("image", "text")
                if world.present[name][item]
            ]
        if fields != "features":
            for table in world.attributes.values():
                own = [int(index) for index in table[item] if index >= 0]
                existing += [model.attribute.weight[own].mean(0)] if own else []
        if not existing:
            assert (vectors_ND[item] == 0).all()
            continue
        stacked = torch.stack(existing)
        weights = model.field_attention(stacked).softmax(0)
        torch.testing.assert_close(vectors_ND[item], (weights * stacked).sum(0))


def test_fdsa_reads_both_streams_and_ranks_by_ids() -> None:
    model = build("fdsa", fields="both", **ATTRIBUTES).double().eval()
    world = features()
    world = ItemFeatures(
        n_items=N,
        vectors={name: x.double() for name, x in world.vectors.items()},
        present=world.present,
        attributes=world.attributes,
    )
    row = [1, 2, 3]
    ids = model.sequence_encoder(model.item_encoder.weight[row][None], torch.tensor([3]))
    fields = model.item_features(torch.tensor(row), world)
    stream = model.feature_stream(fields[None], torch.tensor([3]))
    expected = model.norm(model.out(torch.cat([ids[0, -1], stream[0, -1]])))
    items = model.encode_items(world)
    query = model.encode_sequences(items, sequences([row, [4]]), world)[0]
    torch.testing.assert_close(query, expected)
    assert items is model.item_encoder.weight


def test_attributes_are_refused_where_none_are_named() -> None:
    for model, setting in (("fdsa", {"fields": "both"}), ("s3rec", {"objective": "pretrain"})):
        with pytest.raises(UserError, match="attributes="):
            worlds.small_settings(model, **setting)


def test_the_losses_of_s3rec_equal_their_equations() -> None:
    state, table = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    has = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.float64)
    total = 0.0
    for m in range(3):
        for a in range(5):
            chance = 1 / (1 + math.exp(-float(state[m] @ table[a])))
            total -= math.log(chance if has[m, a] else 1 - chance)
    assert attribute_loss(state, table, has).item() == pytest.approx(total)
    positive, negative = torch.randn(2, 3, 4, dtype=torch.float64)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    expected = sum(
        -math.log(
            sigmoid(sigmoid(float(state[m] @ positive[m])) - sigmoid(float(state[m] @ negative[m])))
        )
        for m in range(3)
    )
    assert ranking_loss(state, positive, negative).item() == pytest.approx(expected)


def test_pretraining_is_the_sum_of_the_four_objectives(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("s3rec", objective="pretrain", **ATTRIBUTES).double().eval()
    rows = [[0, 1, 2, 3], [5, 6]]
    is_masked = torch.tensor([[False, True, False, True], [False, True, False, False]])
    monkeypatch.setattr(model, "_draw_masks", lambda *args: is_masked)
    monkeypatch.setattr(model, "_other_items", lambda masked, *args: (masked.item_M + 5) % N)
    batch = worlds.batch(sequences(rows), features(), torch.Generator().manual_seed(1))
    losses = model.loss(batch)

    def head(name: str, x: Tensor) -> Tensor:
        mapped: Tensor = model.heads[name](x)
        return mapped

    expected = {"aap": 0.0, "mip": 0.0, "map": 0.0}
    for row, masks in zip(rows, is_masked.tolist(), strict=True):
        x = torch.stack(
            [
                model.mask_D if hidden else model.item_encoder.weight[item]
                for item, hidden in zip(row, masks[: len(row)], strict=True)
            ]
        )
        states = model.sequence_encoder(x[None], torch.tensor([len(row)]))[0]
        for slot, item in enumerate(row):
            name = "map" if masks[slot] else "aap"
            has = torch.zeros(A, dtype=torch.float64)
            has[attributes_of(item)] = 1
            scores = model.attribute.weight @ head(name, states[slot])
            chances = scores.sigmoid()
            cross = -(has * chances.log() + (1 - has) * (1 - chances).log()).sum()
            expected[name] += cross.item() / len(rows)
            if masks[slot]:
                query = head("mip", states[slot])
                pair = [model.item_encoder.weight[i] @ query for i in (item, (item + 5) % N)]
                margin = pair[0].sigmoid() - pair[1].sigmoid()
                expected["mip"] += -margin.sigmoid().log().item() / len(rows)
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-5), name
    weighted = 0.2 * losses["aap"] + losses["mip"] + losses["map"] + 0.5 * losses["sp"]
    torch.testing.assert_close(losses["loss"].double(), weighted.double())


def test_every_parameter_is_pretrained_and_the_pretrained_encoder_looks_ahead() -> None:
    model = build("s3rec", objective="pretrain", **ATTRIBUTES)
    rows = sequences([[0, 1, 2, 3], [5, 6, 7]])
    batch = worlds.batch(rows, features(), torch.Generator().manual_seed(1))
    model.loss(batch)["loss"].backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []
    pair = torch.tensor([[1, 2, 3], [1, 2, 9]])
    for objective, is_equal in (("next", True), ("pretrain", False)):
        model = build("s3rec", objective=objective, **ATTRIBUTES).eval()
        states = model.sequence_encoder(model.item_encoder(pair), torch.tensor([3, 3]))
        assert torch.allclose(states[0, :2], states[1, :2], atol=1e-6) == is_equal


@pytest.fixture
def house(warehouse: Warehouse) -> Warehouse:
    """Users stay in one genre; every item has its genre as an attribute."""
    rng = np.random.default_rng(0)
    rows = [(6 * (user % 2) + rng.permutation(6)).tolist() for user in range(24)]
    worlds.prepare(warehouse, rows, N)
    items = [
        {"item": i, "item_id": f"i{i}", "attributes": json.dumps({"genre": f"g{i // 6}"})}
        for i in range(N)
    ]
    path = warehouse.dataset_dir("world") / "items" / "part-00000.parquet"
    write_table(path, pa.Table.from_pylist(items, ITEMS_SCHEMA))
    return warehouse


def test_a_pretrained_run_is_fine_tuned(house: Warehouse) -> None:
    small = ["dim=8", "hidden=16", "length=6", "device=cpu", "batch_size=8", "attributes=genre"]
    pretrained = worlds.begin(
        house, "s3rec", settings=[*small, "epochs=8", "lr=0.01"], is_pretraining=True, name="p"
    )
    report = train_run(pretrained)
    assert report.finished
    tuned = worlds.begin(house, "s3rec", settings=[*small, "epochs=2"], init="p", name="t")
    source, target = load_file(pretrained.weights), dict(tuned.model.named_parameters())
    assert torch.equal(source["item_encoder.weight"], target["item_encoder.weight"])
    blocks = [name for name in target if name.startswith("sequence_encoder.")]
    assert all(torch.equal(source[name], target[name]) for name in blocks)
    assert train_run(tuned).finished


def genres_in_turn() -> tuple[Dataset, ItemFeatures]:
    """Return a world in which the genre of an item decides the genre of the next one.

    After an item of genre g comes any item of genre g + 1. An item occurs about twice in training,
    so its ids tell little, and its genre tells everything that can be known.
    """
    rng = np.random.default_rng(0)
    rows = [
        [(user + step) % GENRES * SIZE + int(rng.integers(SIZE)) for step in range(7)]
        for user in range(60)
    ]
    genre_NP = torch.arange(GENRES * SIZE)[:, None] // SIZE
    features = ItemFeatures(
        n_items=GENRES * SIZE, vectors={}, present={}, attributes={"genre": genre_NP}
    )
    return worlds.dataset(rows, GENRES * SIZE), features


@pytest.mark.heavy
def test_pretraining_over_attributes_helps_where_interactions_are_few() -> None:
    world, item_features = genres_in_turn()
    data = worlds.training_data(world, item_features)
    catalogue = Catalogue(n_items=GENRES * SIZE, n_users=60, widths={}, n_attributes=GENRES)

    def trained(objective: str, epochs: int, weights: dict[str, Tensor], seed: int) -> Any:
        torch.manual_seed(seed)
        settings = worlds.small_settings("s3rec", objective=objective, attributes="genre", dim=32,
                                         hidden=32, length=8, dropout=0.1)  # fmt: skip
        model = MODELS.find("s3rec").load()(settings, catalogue)
        model.load_state_dict(weights, strict=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
        shard = Shard()
        for epoch in range(epochs):
            _, batches = data.epoch(model.window_sampling, batch_size=16, seed=0, epoch=epoch,
                                    skip=0, shard=shard)  # fmt: skip
            for batch in batches:
                optimizer.zero_grad()
                model.loss(batch)["loss"].backward()
                optimizer.step()
        return model.eval()

    def hits(model: Any) -> float:
        ranks = worlds.ranks(model, world, item_features).kept
        return float((ranks <= SIZE).mean())

    # A random list gives 1/6. With 60 users a hit is 0.017, so three seeds are compared.
    gains = []
    for seed in range(3):
        pretrained = trained("pretrain", 40, {}, seed).state_dict()
        own = {name for name, _ in trained("next", 0, {}, seed).named_parameters()}
        weights = {name: values for name, values in pretrained.items() if name in own}
        gains.append(hits(trained("next", 5, weights, seed)) - hits(trained("next", 5, {}, seed)))
    assert min(gains) > 0, gains
    assert sum(gains) / len(gains) > 0.1, gains


def test_a_changed_attribute_is_another_run(house: Warehouse) -> None:
    settings = ["dim=8", "hidden=16", "length=6", "fields=attributes", "attributes=genre"]
    first = worlds.begin(house, "fdsa", settings=settings, name="a").spec.digest()
    path = house.dataset_dir("world") / "items" / "part-00000.parquet"
    items = [
        {"item": i, "item_id": f"i{i}", "attributes": json.dumps({"genre": f"g{i // 4}"})}
        for i in range(N)
    ]
    write_table(path, pa.Table.from_pylist(items, ITEMS_SCHEMA))
    assert worlds.begin(house, "fdsa", settings=settings, name="b").spec.digest() != first
