"""A planted world: taste is in the texts alone, and some items nobody has clicked in training."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from features.dataset import Dataset
from tests.marks import heavy_after
from tests.trainer import worlds
from trainer.checkpoint import load_weights
from trainer.config import TrainConfig
from trainer.data.batches import ItemFeatures
from trainer.evaluation.ranking import rank_split
from trainer.loop import fit
from trainer.tasks.next_item import NextItem

TASTES, EACH = 6, 8
N = TASTES * EACH  # item n belongs to taste n % TASTES; items below TASTES are never trained on


def world(seed: int = 0) -> tuple[Dataset, ItemFeatures]:
    rng = np.random.default_rng(seed)
    sequences = []
    for user in range(120):
        taste = user % TASTES
        known = taste + TASTES * rng.permutation(np.arange(1, EACH))
        sequences.append([*known[:6].tolist(), taste])  # the test target is the unseen one
    vectors = np.eye(TASTES)[np.arange(N) % TASTES] + 0.3 * rng.standard_normal((N, TASTES))
    features = ItemFeatures(
        n_items=N,
        vectors={"text": torch.tensor(vectors, dtype=torch.float32)},
        present={"text": torch.ones(N, dtype=torch.bool)},
    )
    return worlds.dataset(sequences, N), features


def cold_ranks(name: str, folder: Path, **settings: Any) -> tuple[float, float]:
    """Mean filtered rank of the unseen targets: by the model, by popularity."""
    dataset, features = world()
    options = {"stride": 2} if name == "mmsrec" else {}
    sizes: dict[str, Any] = {"dim": 16, "heads": 2, "hidden": 32, "length": 8, "dropout": 0.1}
    model = worlds.build(name, features, **sizes, **options, **settings)
    data = worlds.training_data(dataset, features)
    model.fit_buffers(features, data.train)
    config = TrainConfig(epochs=15, batch_size=16, lr=3e-3, patience=15)
    task = NextItem(model, data)
    fit(task, config, folder, {}, on_epoch=lambda row: None, on_progress=lambda tick: None)
    load_weights(folder / "model.safetensors", model, {})
    ranks = rank_split(model, data, "test", 64)
    assert dataset.cold[ranks.targets_E].all()
    popular = worlds.popularity_ranks(dataset).filtered
    return float(ranks.ranks.filtered.mean()), float(popular.mean())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    heavy_after(
        4,
        [
            ("mmsrec", {}),
            ("unisrec", {}),
            ("unisrec", {"objective": "contrast"}),
            ("vqrec", {}),
            ("vqrec", {"objective": "contrast"}),
            ("morec", {}),
            ("fmrlrec", {}),
        ],
    ),
)
def test_an_item_that_nobody_has_clicked_is_found_by_its_text(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    by_text, by_popularity = cold_ranks(name, tmp_path, **settings)
    assert by_text < 10  # chance is 21: half of the 42 items that are left
    assert by_popularity > 30


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sasrec", "tedrec"])
def test_candidates_that_are_ids_alone_cannot_find_it(name: str, tmp_path: Path) -> None:
    by_id, _ = cold_ranks(name, tmp_path)
    assert by_id > 20
