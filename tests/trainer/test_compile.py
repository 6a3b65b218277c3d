"""Compiled modules are not compiled again for each shape of a batch."""

from typing import Any

import numpy as np
import pytest
import torch._dynamo
from torch._dynamo.utils import counters

from tests.trainer import worlds


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of dynamo itself
@pytest.mark.parametrize(
    ("name", "settings"), [("sasrec", {}), ("mmsrec", {"candidates": 8})], ids=str
)
def test_batches_of_many_shapes_share_a_few_graphs(name: str, settings: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 30, rng.integers(5, 20)).tolist() for _ in range(100)]
    features = worlds.features(30)
    data = worlds.training_data(worlds.dataset(sequences, 30), features)
    model = worlds.build(name, features, length=18, **settings).train()
    torch._dynamo.reset()
    counters.clear()
    for module in model.compiled_parts():
        module.compile(backend="eager")
    shapes = set()
    for epoch in range(2):
        _, batches = data.epoch(model.window_sampling, batch_size=8, seed=0, epoch=epoch)
        for batch in batches:
            shapes.add(batch.sequences.items_BL.shape)
            model.loss(batch)["loss"].backward()
    assert len(shapes) > 6
    assert counters["stats"]["unique_graphs"] <= 4
