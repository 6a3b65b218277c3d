"""DuoRec: the contrastive loss against its equation, and histories with the same target."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer import worlds
from trainer.models.duorec import info_nce

N = 12


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_contrast_equals_its_equation(rows: int) -> None:
    first, second = torch.randn(2, rows, 4, dtype=torch.float64)
    vectors = torch.cat([first, second])
    total = 0.0
    for a in range(2 * rows):
        positive = (a + rows) % (2 * rows)
        scores = {b: float(vectors[a] @ vectors[b]) for b in range(2 * rows) if b != a}
        total += math.log(sum(map(math.exp, scores.values()))) - scores[positive]
    assert info_nce(first, second).item() == pytest.approx(total / (2 * rows))


def batches(rows: str, seed: int = 0) -> list[tuple[Any, Any]]:
    """The batches of an epoch, and the histories that the model draws for them."""
    data = worlds.training_data(worlds.cycles(seed=seed), worlds.features(N))
    model: Any = worlds.build("duorec", worlds.features(N), rows=rows)
    _, epoch = data.epoch(model.window_sampling, batch_size=16, seed=1, epoch=0)
    return [
        (batch, model.same_target(data.train).draw(batch, model.settings.length)) for batch in epoch
    ]


@pytest.mark.parametrize("rows", ["windows", "prefixes"])
def test_the_other_history_is_of_training_and_leads_to_the_same_item(rows: str) -> None:
    """In the world of cycles item i follows i - 1, so every such history ends with i - 1."""
    world = worlds.cycles()
    training = {
        tuple(world.items[begin:end][:stop])
        for begin, end in zip(world.offsets[:-1], world.train_ends(), strict=True)
        for stop in range(1, end - begin)
    }
    differs = 0
    for batch, other in batches(rows):
        for row, length in enumerate(batch.sequences.lengths_B.tolist()):
            target = int(batch.sequences.items_BL[row, length - 1])
            drawn = other.items_BL[row, : other.lengths_B[row]].tolist()
            assert drawn[-1] == (target - 1) % N
            assert any(tuple(history[-len(drawn) :]) == tuple(drawn) for history in training)
            differs += drawn != batch.sequences.items_BL[row, : length - 1].tolist()
    assert differs > 50


def test_a_target_that_occurs_once_has_its_own_history() -> None:
    world = worlds.dataset([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], N)
    data = worlds.training_data(world, worlds.features(N))
    model: Any = worlds.build("duorec", worlds.features(N), rows="prefixes")
    _, epoch = data.epoch(model.window_sampling, batch_size=16, seed=1, epoch=0)
    (batch,) = epoch
    other = model.same_target(data.train).draw(batch, 6)
    inputs = batch.sequences.lengths_B - 1
    assert torch.equal(other.lengths_B, inputs)
    for row, length in enumerate(inputs.tolist()):
        own = batch.sequences.items_BL[row, :length]
        assert torch.equal(other.items_BL[row, :length], own)


def test_each_other_history_is_drawn_about_equally_often() -> None:
    world = worlds.dataset([[i, 11, 0, 1] for i in range(5)], N)
    data = worlds.training_data(world, worlds.features(N))
    model: Any = worlds.build("duorec", worlds.features(N), rows="prefixes")
    counts = np.zeros((5, 5))
    for seed in range(400):
        _, epoch = data.epoch(model.window_sampling, batch_size=16, seed=seed, epoch=0)
        for batch in epoch:
            other = model.same_target(data.train).draw(batch, 6)
            np.add.at(counts, (batch.sequences.items_BL[:, 0], other.items_BL[:, 0]), 1)
    assert (np.diag(counts) == 0).all()
    assert counts[~np.eye(5, dtype=bool)].min() > 60  # 100 are expected


@pytest.mark.parametrize("rows", ["windows", "prefixes"])
def test_the_contrast_has_its_weight_at_each_target_with_views(rows: str) -> None:
    data = worlds.training_data(worlds.cycles(), worlds.features(N))
    model: Any = worlds.build("duorec", worlds.features(N), contrast=0.3, rows=rows).eval()
    _, epoch = data.epoch(model.window_sampling, batch_size=16, seed=1, epoch=0)
    batch = next(iter(epoch))
    losses = model.loss(batch)
    lengths_B = batch.sequences.lengths_B
    targets = len(lengths_B) if rows == "prefixes" else int((lengths_B - 1).sum())
    assert (targets == len(lengths_B)) == (rows == "prefixes")
    expected = losses["next"] + 0.3 * len(lengths_B) / targets * losses["contrast"]
    torch.testing.assert_close(losses["loss"], expected)
