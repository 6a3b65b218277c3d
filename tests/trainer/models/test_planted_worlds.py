"""Worlds in which taste is only in pictures, only in texts, or only in the order of a history.

Each part learns what it can see, and nothing of what it cannot. Texts alone, for mmsrec and mmsr,
are in test_planted and test_mmsr; ids and order in test_loop.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from features.dataset import Dataset
from tests.trainer import worlds
from tests.trainer.models import test_planted as planted
from trainer.data.batches import ItemFeatures
from trainer.models.base import Recommender

N = 12
SETTINGS: dict[str, dict[str, Any]] = {
    "mmsr": {"heads": 2, "fusion_heads": 2},
    "pmmrec": {"heads": 2, "fusion_heads": 2},
}
OTHER = {"image": "text", "text": "image"}


def trained(
    name: str, world: tuple[Dataset, ItemFeatures], epochs: int, lr: float, **more: Any
) -> Recommender:
    dataset, features = world
    small = {"dim": 16, "hidden": 32, "length": 8, **SETTINGS[name], **more}
    model = worlds.build(name, features, **small)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    data = worlds.training_data(dataset, features)
    for epoch in range(epochs):
        for batch in data.epoch(model.window_sampling, batch_size=16, seed=1, epoch=epoch)[1]:
            optimizer.zero_grad()
            model.loss(batch)["loss"].backward()
            optimizer.step()
    return model


def mean_rank(model: Recommender, dataset: Dataset, features: ItemFeatures, seen: str) -> float:
    ranks = worlds.ranks(model, dataset, features)
    return float(getattr(ranks, seen).mean())


def taste(where: str, given: tuple[str, ...]) -> tuple[Dataset, ItemFeatures]:
    """Taste is in one modality, the other is noise; targets are items that nobody has clicked."""
    dataset, held = planted.world()
    noise = torch.randn(planted.N, 6, generator=torch.Generator().manual_seed(3))
    both = {where: held.vectors["text"], OTHER[where]: noise}
    there = held.present["text"]
    features = ItemFeatures(
        n_items=planted.N,
        vectors={name: both[name] for name in given},
        present=dict.fromkeys(given, there),
    )
    return dataset, features


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "where"), [("mmsr", "image"), ("pmmrec", "image"), ("pmmrec", "text")]
)
def test_taste_in_one_modality_is_found_beside_noise_in_the_other(name: str, where: str) -> None:
    world = taste(where, ("image", "text"))
    assert mean_rank(trained(name, world, 8, 5e-3), *world, "filtered") < 4  # chance is 21


@pytest.mark.slow
def test_taste_in_pictures_is_not_found_by_texts() -> None:
    world = taste("image", ("text",))
    # Six unseen items: luck is not far from chance.
    assert mean_rank(trained("pmmrec", world, 8, 5e-3), *world, "filtered") > 8


def order() -> tuple[Dataset, ItemFeatures]:
    """Every other item is any, the one after it its successor: what else one has tells nothing."""
    rng = np.random.default_rng(0)
    sequences = []
    for _ in range(150):
        any_of_all = rng.integers(N, size=4)
        sequences.append(np.stack([any_of_all, (any_of_all + 1) % N], axis=1).ravel().tolist())
    return worlds.dataset(sequences, N), worlds.features(N, missing=False)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "more"), [("mmsr", {"tower": "gru"}), ("pmmrec", {})])
def test_order_is_learned_from_features_that_mean_nothing(name: str, more: dict[str, Any]) -> None:
    """Features only tell items apart; where the history's order is turned round, all is lost."""
    dataset, features = order()
    model = trained(name, (dataset, features), 10, 1e-2, **more)
    turned = dataset.items.reshape(150, 8).copy()
    turned[:, :7] = turned[:, 6::-1]
    assert mean_rank(model, dataset, features, "kept") < 2  # chance is 6.5
    other = replace(dataset, items=turned.ravel())
    assert mean_rank(model, other, features, "kept") > 4.5
