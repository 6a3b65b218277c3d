"""The bias on the items of a history, in the loss and in the ranking."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retrieval.seen_items import SeenItems
from tests.trainer import worlds
from trainer.config import TrainConfig
from trainer.data.batches import Batch
from trainer.evaluation.ranking import rank_split
from trainer.loop import fit
from trainer.losses.base import history_pairs, targets_at
from trainer.models.causal import next_item_targets
from trainer.modules.sequence_encoders import take_slots
from trainer.tasks.next_item import NextItem

N = 12
ROWS = [[0, 1, 0, 3, 11, 1], [5, 6], [7, 8, 9, 9, 7]]


def batch(item_features: Any) -> Batch:
    rows = worlds.sequences(ROWS, padding=3)
    return worlds.batch(rows, item_features, torch.Generator().manual_seed(2))


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.lists(st.integers(0, 4), min_size=6, max_size=6), min_size=1, max_size=5),
    st.booleans(),
)
def test_the_history_of_a_position_is_the_set_of_its_items(
    rows: list[list[int]], includes_slot: bool
) -> None:
    items_BL = torch.tensor(rows)
    is_target_BL = torch.ones_like(items_BL, dtype=torch.bool)
    targets, slot_M = targets_at(
        is_target_BL, items_BL, history_BL=items_BL, includes_slot=includes_slot
    )
    assert targets.history is not None
    found: list[list[int]] = [[] for _ in slot_M]
    for position, item in zip(
        targets.history.row_P.tolist(), targets.history.item_P.tolist(), strict=True
    ):
        found[position].append(item)
    for slot, items in zip(slot_M.tolist(), found, strict=True):
        row, column = divmod(slot, 6)
        assert sorted(items) == sorted(set(rows[row][: column + includes_slot]))


def test_a_position_without_a_history_has_no_pairs() -> None:
    pairs = history_pairs(torch.tensor([[3, 4]]), torch.tensor([0]), torch.tensor([-1]))
    assert len(pairs.row_P) == 0


@pytest.mark.parametrize("rows", ["windows", "prefixes"])
def test_the_loss_is_the_cross_entropy_of_the_biased_logits(rows: str) -> None:
    features = worlds.features(N)
    model: Any = worlds.build("sasrec", features, history_bias=True, rows=rows).double().eval()
    torch.nn.init.constant_(model.history_bias, -1.25)
    loss = model.loss(batch(features))["loss"]
    loss.backward()

    inputs, targets, slot_M = next_item_targets(batch(features), only_last=rows == "prefixes")
    item_ND = model.encode_items(features)
    query_MD = take_slots(model.states(model.batch_items(batch(features), None), inputs), slot_M)
    bias = torch.tensor(-1.25, dtype=torch.float64, requires_grad=True)
    values: list[Tensor] = []
    for query_D, item, slot in zip(query_MD, targets.item_M, slot_M, strict=True):
        row, column = divmod(int(slot), inputs.items_BL.shape[1])
        logits = item_ND @ query_D
        for seen in set(inputs.items_BL[row, : column + 1].tolist()):
            logits = logits + bias * torch.eye(N, dtype=torch.float64)[seen]
        values.append(torch.logsumexp(logits, 0) - logits[item])
    expected = torch.stack(values).mean()
    (gradient,) = torch.autograd.grad(expected, bias)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.history_bias.grad, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", worlds.models_with("history_bias"))
def test_the_bias_of_every_model_learns(name: str) -> None:
    features = worlds.features(N)
    model = worlds.build(name, features, history_bias=True, loss="softmax")
    model.loss(batch(features))["loss"].backward()
    assert model.history_bias is not None
    assert model.history_bias.grad is not None
    assert model.history_bias.grad != 0


@pytest.mark.parametrize("score", ["dot", "cosine"])
def test_the_ranking_adds_it_to_each_item_of_the_whole_history(score: str) -> None:
    features = worlds.features(N)
    options: dict[str, Any] = {"score": score, "temperature": 0.5, "length": 2}
    model = worlds.build("sasrec", features, history_bias=True, **options)
    model.start_history_bias(worlds.training_data(worlds.cycles(), features).train)
    assert model.history_bias is not None
    histories = SeenItems(items=np.array([3, 1, 3, 2]), offsets=np.array([0, 3, 3, 4]))
    scores = model.correction(histories)
    assert scores is not None
    assert scores.items.tolist() == [1, 3, 2]
    assert scores.offsets.tolist() == [0, 2, 2, 3]
    np.testing.assert_allclose(scores.values, 0.5 * model.history_bias.item())


def test_it_starts_at_the_log_of_the_share_of_repeated_training_targets() -> None:
    # The last two items of each sequence are held out: 3 + 2 targets are left, 2 of them repeated.
    world = worlds.dataset([[0, 1, 0, 1, 2, 2], [5, 6, 7, 7, 7]], N)
    features = worlds.features(N)
    model = worlds.build("sasrec", features, history_bias=True, loss="bce")
    model.start_history_bias(worlds.training_data(world, features).train)
    assert model.history_bias is not None
    assert model.history_bias.item() == pytest.approx(math.log((2 + 1) / (5 + 2)))
    model.loss(batch(features))["loss"].backward()
    assert model.history_bias.grad is None  # a sampled negative is never an item of the history


@pytest.mark.slow
def test_without_repeated_targets_the_ranking_that_keeps_seen_items_is_the_filtered_one(
    tmp_path: Path,
) -> None:
    world, features = worlds.cycles(n_items=24), worlds.features(24)
    ranks = {}
    for history_bias in (False, True):
        model = worlds.build("sasrec", features, history_bias=history_bias, dropout=0.1)
        data = worlds.training_data(world, features)
        model.start_history_bias(data.train)
        task = NextItem(model, data)
        config = TrainConfig(epochs=3, batch_size=16, lr=3e-3)
        folder = tmp_path / str(history_bias)
        folder.mkdir()
        fit(task, config, folder, {}, on_epoch=lambda row: None, on_progress=lambda tick: None)
        ranks[history_bias] = rank_split(model, data, "test", 64).ranks
    assert (ranks[True].kept == ranks[True].filtered).all()
    assert (ranks[False].kept > ranks[False].filtered).any()
