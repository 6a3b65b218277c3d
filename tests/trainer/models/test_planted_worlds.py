"""Worlds in which taste is only in images, only in texts, or only in the order of a history.

A model learns the taste from the features that show it, and nothing from other features. Texts
alone, for mmsrec and mmsr, are in test_planted and test_mmsr; ids and order in test_loop.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from features.dataset import Dataset
from tests.marks import heavy_after
from tests.trainer import worlds
from tests.trainer.models import test_planted as planted
from trainer.data.batches import ItemFeatures
from trainer.models.base import Recommender

N = 12
SETTINGS: dict[str, dict[str, Any]] = {
    "mmsr": {"heads": 2, "fusion_heads": 2},
    "pmmrec": {"heads": 2, "fusion_heads": 2},
    "unisrec": {"heads": 2, "dropout": 0.1},
    "vqrec": {"heads": 2, "dropout": 0.1},
    "morec": {"heads": 2},
    "tedrec": {"heads": 2, "dropout": 0.1},
    "fmrlrec": {},
}
OTHER = {"image": "text", "text": "image"}


def trained(
    name: str, world: tuple[Dataset, ItemFeatures], epochs: int, lr: float, **settings: Any
) -> Recommender:
    dataset, features = world
    small = {"dim": 16, "hidden": 32, "length": 8, **SETTINGS[name], **settings}
    model = worlds.build(name, features, **small)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    data = worlds.training_data(dataset, features)
    model.fit_buffers(features, data.train)
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
    dataset, planted_features = planted.world()
    noise = torch.randn(planted.N, 6, generator=torch.Generator().manual_seed(3))
    both = {where: planted_features.vectors["text"], OTHER[where]: noise}
    present = planted_features.present["text"]
    features = ItemFeatures(
        n_items=planted.N,
        vectors={name: both[name] for name in given},
        present=dict.fromkeys(given, present),
    )
    return dataset, features


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("mmsr", "image"),
        ("pmmrec", "image"),
        ("pmmrec", "text"),
        ("morec", "image"),
        ("fmrlrec", "image"),
    ],
)
def test_taste_in_one_modality_is_learned_although_the_other_is_noise(
    name: str, where: str
) -> None:
    world = taste(where, ("image", "text"))
    assert mean_rank(trained(name, world, 8, 5e-3), *world, "filtered") < 4  # chance is 21


@pytest.mark.slow
def test_taste_in_images_is_not_learned_from_texts() -> None:
    world = taste("image", ("text",))
    # Six unseen items: luck is not far from chance.
    assert mean_rank(trained("pmmrec", world, 8, 5e-3), *world, "filtered") > 8


def order() -> tuple[Dataset, ItemFeatures]:
    """A history is pairs of a random item and its successor: only the order predicts an item."""
    rng = np.random.default_rng(0)
    sequences = []
    for _ in range(150):
        any_of_all = rng.integers(N, size=4)
        sequences.append(np.stack([any_of_all, (any_of_all + 1) % N], axis=1).ravel().tolist())
    return worlds.dataset(sequences, N), worlds.features(N, missing=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    heavy_after(
        4,
        [
            ("mmsr", {"sequence_encoder": "gru"}),
            ("pmmrec", {}),
            ("unisrec", {}),
            ("vqrec", {}),
            ("morec", {}),
            ("tedrec", {}),
            ("tedrec", {"rows": "prefixes"}),
            ("fmrlrec", {}),
        ],
    ),
)
def test_order_is_learned_from_features_that_mean_nothing(
    name: str, settings: dict[str, Any]
) -> None:
    """Features only tell items apart: reversed histories rank like chance."""
    dataset, features = order()
    model = trained(name, (dataset, features), 10, 1e-2, **settings)
    reversed_items = dataset.items.reshape(150, 8).copy()
    reversed_items[:, :7] = reversed_items[:, 6::-1]
    assert mean_rank(model, dataset, features, "kept") < 2  # chance is 6.5
    other = replace(dataset, items=reversed_items.ravel())
    assert mean_rank(model, other, features, "kept") > 4.5
