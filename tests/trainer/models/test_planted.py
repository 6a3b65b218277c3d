"""A planted world: taste is in the texts alone, and some items nobody has clicked in training."""

from pathlib import Path

import numpy as np
import pytest
import torch

from features.dataset import Dataset
from retrieval.ranking import rank
from tests.trainer import worlds
from trainer.checkpoint import load_weights
from trainer.config import TrainConfig
from trainer.data.batches import ItemFeatures
from trainer.evaluation.encode import encode, popularity_ranks, seen_by, targets_of
from trainer.loop import fit
from trainer.models.base import Catalogue
from trainer.models.registry import MODELS
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


def cold_ranks(name: str, folder: Path) -> tuple[float, float]:
    """Mean filtered rank of the unseen targets: by the model, by popularity."""
    dataset, features = world()
    settings, recommender = MODELS[name].load()
    more = {"stride": 2} if name == "mmsrec" else {}
    small = settings(dim=16, heads=2, hidden=32, length=8, dropout=0.1, **more)
    torch.manual_seed(0)
    model = recommender(small, Catalogue(n_items=N, widths=features.widths))
    data = worlds.training_data(dataset, features)
    config = TrainConfig(epochs=15, batch_size=16, lr=3e-3, patience=15)
    task = NextItem(model, data)
    fit(task, config, folder, {}, on_epoch=lambda row: None, on_tick=lambda tick: None)
    load_weights(folder / "model.safetensors", model, {})
    encoded = encode(model, data, "test", 64)
    held = encoded.held
    targets, seen = targets_of(dataset, held), seen_by(dataset, held)
    assert dataset.cold[targets].all()
    ranks = rank(encoded.queries_ED, encoded.items_ND, targets, seen).filtered
    return float(ranks.mean()), float(popularity_ranks(dataset, held).filtered.mean())


@pytest.mark.slow
def test_an_item_that_nobody_has_clicked_is_found_by_its_text(tmp_path: Path) -> None:
    by_text, by_popularity = cold_ranks("mmsrec", tmp_path)
    assert by_text < 10  # chance is 21: half of the 42 items that are left
    assert by_popularity > 30


@pytest.mark.slow
def test_ids_alone_cannot_find_it(tmp_path: Path) -> None:
    by_id, _ = cold_ranks("sasrec", tmp_path)
    assert by_id > 20
