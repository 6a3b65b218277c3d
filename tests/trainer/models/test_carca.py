"""CARCA: scores against the paper's equations, dates by hand, and no look at the target."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from features.dataset import Dataset
from tests.trainer import worlds
from trainer.data.batches import ItemFeatures, Sequences
from trainer.models.base import Catalogue
from trainer.models.carca import CARCA, CARCAConfig, dates

N, DAY = 12, 86_400


def double(features: ItemFeatures) -> ItemFeatures:
    return replace(features, vectors={name: x.double() for name, x in features.vectors.items()})


def build(unit: str | None = "s", **settings: Any) -> CARCA:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"dim": 8, "heads": 2, "layers": 2, "length": 6, **settings}
    catalogue = Catalogue(n_items=N, n_users=9, widths=worlds.features(N).widths, time_unit=unit)
    model = CARCA(CARCAConfig(**sizes), catalogue).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def with_times(world: Dataset, seed: int = 0) -> Dataset:
    steps = np.random.default_rng(seed).integers(DAY, 40 * DAY, len(world.items))
    return replace(world, times=10**9 + np.cumsum(steps))


def test_dates_by_hand() -> None:
    moments = ["1970-01-01", "2000-02-29", "2026-12-31"]  # Thursday, Tuesday, Thursday
    days = np.array(moments, "datetime64[D]")
    expected = [
        [0, 0, 0, 3 / 6, 0, 0],
        [0.30, 1 / 11, 28 / 30, 1 / 6, 59 / 365, 8 / 52],
        [0.56, 1, 1, 3 / 6, 364 / 365, 1],
    ]
    for unit in ("D", "s", "ms", "us", "ns"):
        times = torch.from_numpy(days.astype(f"datetime64[{unit}]").astype(np.int64))
        torch.testing.assert_close(dates(times, unit), torch.tensor(expected))


@pytest.mark.parametrize("unit", ["D", "s", "ms", "us", "ns"])
def test_the_unit_of_times_is_told_by_their_size(unit: str) -> None:
    world = worlds.cycles(users=3)
    moments = np.full(len(world.items), "2011-05-06", f"datetime64[{unit}]").astype(np.int64)
    assert replace(world, times=moments).time_unit == unit
    assert world.time_unit is None


def attend(part: Any, queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """The values (D) that one query reads from keys (L, D)."""
    query, key, value = (
        functional.leaky_relu(layer(x))
        for layer, x in ((part.query, queries), (part.key, keys), (part.value, keys))
    )
    width = query.shape[-1] // heads
    read = []
    for head in range(heads):
        columns = slice(head * width, (head + 1) * width)
        weights = (key[:, columns] @ query[columns] / width**0.5).softmax(0)
        read.append(weights @ value[:, columns])
    return torch.cat(read)


def token(model: CARCA, item: int, features: ItemFeatures, time: int | None) -> Tensor:
    """Eq. 1 to 3: the joined id, features and date of an item."""
    joined = model.features_map(
        torch.cat([features.vectors[name][item] for name in features.present])
    )
    if time is not None:
        assert model.context_map is not None
        joined = joined + model.context_map(dates(torch.tensor(time), "s").double())
    vector: Tensor = model.join(torch.cat([model.item.weight[item], joined]))
    return vector


def reference_scores(
    model: CARCA, history: list[int], times: list[int] | None, request: int | None
) -> Tensor:
    """The scores of the catalogue (N,) for one history, written from the equations."""
    features, settings = double(worlds.features(N)), model.settings
    moments: list[int | None] = [*times] if times else [None] * len(history)
    x = torch.stack(
        [token(model, item, features, at) for item, at in zip(history, moments, strict=True)]
    )
    blocks: list[Any] = list(model.blocks)
    for block in blocks:
        states = []
        for slot in range(len(history)):
            keys = x[: slot + 1] if settings.rows == "windows" else x
            query = block.norm_query(x[slot])
            state = block.norm_feed(query * attend(block.attention, query, keys, settings.heads))
            states.append(state + block.down(functional.leaky_relu(block.up(state))))
        x = torch.stack(states)
    x = model.norm(x)
    scores = []
    for item in range(N):
        candidate = token(model, item, features, request)
        read = attend(model.cross, candidate, x, settings.heads)
        scores.append(model.out(read * candidate if settings.residual else read)[0])
    return torch.stack(scores)


@pytest.mark.parametrize("rows", ["windows", "prefixes"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("timed", [True, False])
def test_scores_equal_the_equations(rows: str, residual: bool, timed: bool) -> None:
    model = build("s" if timed else None, rows=rows, residual=residual)
    histories = [[1, 2, 3, 4], [5]]
    times = [[10**9 + DAY * n for n in (1, 40, 300, 301)], [10**9]]
    requests = [10**9 + 400 * DAY, 10**9 + 3 * DAY]
    sequences = Sequences(
        items_BL=torch.tensor([histories[0], [5, 0, 0, 0]]),
        lengths_B=torch.tensor([4, 1]),
        times_BL=torch.tensor([times[0], times[1] * 4]) if timed else None,
        request_B=torch.tensor(requests) if timed else None,
    )
    with torch.no_grad():
        items = model.encode_items(double(worlds.features(N)))
        parts = [model.score(items, sequences, first, last) for first, last in ((0, 5), (5, N))]
        scores = torch.cat(parts, dim=1)
        for row, history in enumerate(histories):
            expected = reference_scores(
                model, history, times[row] if timed else None, requests[row] if timed else None
            )
            torch.testing.assert_close(scores[row], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", ["windows", "prefixes"])
def test_the_loss_is_the_cross_entropy_of_each_position(
    rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each target is scored from the items before it alone, with the date of its interaction."""
    model = build(rows=rows)
    world = with_times(worlds.dataset([[0, 1, 2, 3, 4, 5, 6]], N))
    data = worlds.training_data(world, double(worlds.features(N)))
    assert world.times is not None
    times = world.times.tolist()
    monkeypatch.setattr(
        "trainer.models.carca.sample_unseen",
        lambda train, users, generator: (torch.full_like(users, 11), torch.ones_like(users).bool()),
    )
    _, batches = data.epoch(model.window_sampling, batch_size=8, seed=1, epoch=0)
    (batch,) = batches
    terms = []
    for end in range(1, 5):  # items 5 and 6 are held out
        scores = reference_scores(model, list(range(end)), times[:end], times[end])
        terms.append(functional.softplus(-scores[end]) + functional.softplus(scores[11]))
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(model.loss(batch)["loss"].double(), expected, rtol=1e-5, atol=1e-6)


def test_an_evaluation_gives_the_time_of_the_held_out_interaction_and_not_its_item() -> None:
    world = with_times(worlds.dataset([[0, 1, 2, 3, 4], [5, 6, 7, 8]], N))
    assert world.times is not None
    data = worlds.training_data(world, worlds.features(N))
    split = world.eval_split("test")
    sequences = data.history_batch(split, slice(0, 2), length=6)
    assert sequences.request_B is not None
    assert sequences.request_B.tolist() == world.times[[4, 8]].tolist()
    other = data.history_batch(replace(split, targets=world.offsets[1:]), slice(0, 2), length=6)
    assert other.request_B is not None
    assert other.request_B.tolist() == world.times[[4, 8]].tolist()  # the newest time


def test_a_run_without_times_says_so() -> None:
    assert build("s").remarks == ()
    (remark,) = build(None).remarks
    assert "times" in remark
