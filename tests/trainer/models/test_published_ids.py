"""The published forms of SASRec and GRU4Rec against float64 loops, and their sizes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from features.errors import UserError
from tests.trainer import worlds
from tests.trainer.models.test_recommenders import build, sequences
from tests.trainer.models.test_released import count, published
from trainer.models.gru4rec import GRU4RecConfig
from trainer.modules.transformer import initialise

N = 12
ROWS = [[0, 1, 2, 3, 11, 7], [5, 6], [7, 8, 9, 10]]


def linear(part: Any, x: Tensor) -> Tensor:
    y: Tensor = x @ part.weight.T + part.bias
    return y


def norm(part: Any, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + part.eps).sqrt()
    y: Tensor = part.weight * centred / scale + part.bias
    return y


def attention(block: Any, query_TD: Tensor, key_TD: Tensor, heads: int) -> Tensor:
    """Causal attention without an output projection, slot by slot and head by head."""
    q, k, v = linear(block.query, query_TD), linear(block.key, key_TD), linear(block.value, key_TD)
    E = q.shape[1] // heads
    out = torch.zeros_like(q)
    for t in range(len(q)):
        for head in range(heads):
            part = slice(head * E, (head + 1) * E)
            weights = torch.softmax(k[: t + 1, part] @ q[t, part] / E**0.5, 0)
            out[t, part] = weights @ v[: t + 1, part]
    return out


def sasrec_states(model: Any, items: list[int]) -> Tensor:
    """SASRec, Eq. 1 to 6 with the residuals of section 3.2, or those of the released code."""
    settings, encoder = model.settings, model.sequence_encoder
    x = torch.stack(
        [
            settings.dim**0.5 * model.item_encoder.weight[item]
            + encoder.position.weight[len(items) - 1 - slot]
            for slot, item in enumerate(items)
        ]
    )
    for block in encoder.blocks:
        normed = norm(block.norm_attention, x)
        if settings.block == "released":
            x = normed + attention(block, normed, x, settings.heads)
        else:
            x = x + attention(block, normed, normed, settings.heads)
        normed = norm(block.norm_feed, x)
        fed = linear(block.down, linear(block.up, normed).clamp_min(0))
        x = (normed if settings.block == "released" else x) + fed
    return norm(encoder.norm, x)


@pytest.mark.parametrize("block", ["pre-ln", "released"])
@pytest.mark.parametrize("heads", [1, 2])
def test_sasrec_before_the_norms_equals_the_formulas(block: str, heads: int) -> None:
    features = worlds.features(N)
    model: Any = build(
        "sasrec", features, block=block, heads=heads, loss="bce", activation="relu", norm_eps=1e-8
    )
    for part in model.modules():
        if isinstance(part, torch.nn.Linear | torch.nn.LayerNorm | torch.nn.Embedding):
            for parameter in part.parameters():
                torch.nn.init.normal_(parameter, std=0.4)
    batch = worlds.batch(sequences(ROWS), features, torch.Generator().manual_seed(1))
    _, targets, _ = model.targets(batch)
    batch.generator.manual_seed(5)
    drawn = model.next_item_loss.draw(targets, batch)
    batch.generator.manual_seed(5)
    mine = model.loss(batch)["loss"]
    mine.backward()
    gradient = model.item_encoder.weight.grad.clone()
    model.zero_grad()
    model.double()
    item_ND = model.item_encoder.weight
    states = torch.cat([sasrec_states(model, row[:-1]) for row in ROWS])
    positive = (states * item_ND[targets.item_M]).sum(1)
    negative = (states * item_ND[drawn.items_X]).sum(1)
    assert bool(drawn.exists_X.all())
    terms = torch.log(torch.sigmoid(positive)) + torch.log(1 - torch.sigmoid(negative))
    expected = -terms.mean()
    expected.backward()
    torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), item_ND.grad, rtol=1e-3, atol=1e-5)


def gru_states(model: Any, items: list[int]) -> Tensor:
    """A GRU, step by step (Cho et al., 2014, as torch has it)."""
    table = model.item_encoder if model.input_vectors is None else model.input_vectors
    gru = model.sequence_encoder.gru
    h = torch.zeros(gru.hidden_size, dtype=torch.float64)
    states = []
    for item in items:
        biases = (gru.bias_ih_l0, gru.bias_hh_l0) if gru.bias else (0, 0)
        inner = gru.weight_ih_l0 @ table.weight[item] + biases[0]
        outer = gru.weight_hh_l0 @ h + biases[1]
        (ir, iz, i_n), (hr, hz, hn) = inner.chunk(3), outer.chunk(3)
        update = torch.sigmoid(iz + hz)
        candidate = torch.tanh(i_n + torch.sigmoid(ir + hr) * hn)
        h = (1 - update) * candidate + update * h
        states.append(h)
    return torch.stack(states)


@pytest.mark.parametrize("tied", [False, True])
def test_gru4rec_as_published_equals_the_formulas(tied: bool) -> None:
    features = worlds.features(N)
    model: Any = build("gru4rec", features, loss="top1", exclude="window", projection=False,
                       gru_bias=True, tied=tied, hidden=8, dim=8)  # fmt: skip
    initialise(model, std=0.5)
    for parameter in model.sequence_encoder.gru.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    batch = worlds.batch(sequences(ROWS), features, torch.Generator().manual_seed(1))
    mine = model.loss(batch)["loss"]
    model.double()
    item_ND = model.item_encoder.weight
    losses = []
    for row in ROWS:
        others = [item for other in ROWS for item in other if item not in row]
        for state, target in zip(gru_states(model, row[:-1]), row[1:], strict=True):
            scores = item_ND @ state
            pairs = [torch.sigmoid(scores[n] - scores[target]) + torch.sigmoid(scores[n] ** 2)
                     for n in others]  # fmt: skip
            losses.append(torch.stack(pairs).mean())
    torch.testing.assert_close(mine.double(), torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)


def test_the_published_sasrec_has_the_parameters_of_the_paper() -> None:
    """Two blocks of D x D maps: three of the attention, two of the feed-forward network."""
    D, items, length = 50, 100, 50
    block = 5 * (D * D + D) + 2 * 2 * D
    expected = items * D + length * D + 2 * block + 2 * D
    assert count(published("sasrec")) == expected
    assert count(published("sasrec", "released")) == expected
    assert count(published("sasrec", "published-ml-1m")) == expected + 150 * D


def test_the_published_gru4rec_has_the_parameters_of_the_papers() -> None:
    """One layer of 100 units: a second table of item vectors in 2016, one table in 2018."""
    D, items = 100, 100
    gru = 3 * (2 * D * D + 2 * D)
    assert count(published("gru4rec")) == 2 * items * D + gru
    assert count(published("gru4rec", "published-2018")) == items * D + gru


def test_states_without_a_projection_have_the_width_of_items() -> None:
    with pytest.raises(UserError, match=r"hidden=128.*dim=64"):
        GRU4RecConfig(projection=False)


@pytest.mark.parametrize("model", ["sasrec", "gru4rec"])
def test_dropout_of_the_published_forms_changes_training_only(model: str) -> None:
    """Dropout acts in training: two losses of one batch differ, and do not in evaluation."""
    features = worlds.features(N)
    options: dict[str, Any] = (
        {"block": "released", "dropout": 0.5}
        if model == "sasrec"
        else {"state_dropout": 0.5, "dropout": 0.0}
    )
    built: Any = build(model, features, **options)
    initialise(built, std=0.5)
    batch = worlds.batch(sequences(ROWS), features, torch.Generator())

    def losses() -> list[float]:
        return [float(built.loss(batch)["loss"].detach()) for _ in range(2)]

    first, second = losses()
    assert first == second
    built.train()
    first, second = losses()
    assert first != second
