"""UniSRec: the adaptor, the scores and the contrasts against the paper's equations in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.trainer import worlds
from tests.trainer.models.sasrec_reference import sasrec_states
from trainer.data.batches import ItemFeatures, Sequences, TrainSet
from trainer.losses.base import ItemVectors, Targets
from trainer.models.text_transfer import TargetColumns
from trainer.models.unisrec import contrast_next_items, contrast_sequences, drop_items
from trainer.modules.adaptor import MixtureAdaptor
from trainer.modules.transformer import initialise

N = 12


def randomised(adaptor: Any) -> None:
    """Draw the parameters that start at zero."""
    for parameter in (adaptor.offset_GPW, adaptor.gate_WG, adaptor.noise_WG):
        torch.nn.init.normal_(parameter)


def adapted(adaptor: Any, x_W: Tensor, position: int = 0) -> Tensor:
    """sum_k g_k (x - b_k) W_k of one vector, without dropout and noise."""
    gates = torch.exp(x_W @ adaptor.gate_WG)
    total = torch.zeros(adaptor.experts[0].weight.shape[0], dtype=x_W.dtype)
    for number, expert in enumerate(adaptor.experts):
        whitened = expert.weight @ (x_W - adaptor.offset_GPW[number, position])
        total = total + gates[number] / gates.sum() * whitened
    return total


@pytest.mark.parametrize("positions", [0, 4])
def test_the_adaptor_equals_its_equation(positions: int) -> None:
    adaptor = MixtureAdaptor(5, 3, experts=4, probability=0.2, positions=positions).double().eval()
    randomised(adaptor)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    at = torch.tensor([[3, 2, 1, 0], [1, 0, 0, 0]])
    out = adaptor(x, at if positions else None)
    for row in range(2):
        for slot in range(4):
            expected = adapted(adaptor, x[row, slot], int(at[row, slot]) if positions else 0)
            torch.testing.assert_close(out[row, slot], expected)


def test_the_gates_are_noisy_in_training_alone() -> None:
    adaptor = MixtureAdaptor(5, 3, experts=4, probability=0.0)
    x = torch.randn(6, 5)
    assert not torch.allclose(adaptor(x), adaptor(x))
    adaptor.eval()
    assert torch.equal(adaptor(x), adaptor(x))
    # Without training, the gates are zero and every expert has the same weight.
    expected = torch.stack([expert(x) for expert in adaptor.experts]).mean(0)
    torch.testing.assert_close(adaptor(x), expected)


@pytest.mark.parametrize("ids", [False, True])
def test_scores_equal_the_equations(ids: bool) -> None:
    features = worlds.features(N)
    double = ItemFeatures(
        n_items=N,
        vectors={name: x.double() for name, x in features.vectors.items()},
        present=features.present,
    )
    model: Any = worlds.build("unisrec", double, ids=ids).double().eval()
    initialise(model, std=0.5)
    for adaptor in model.item_encoder.adaptors.values():
        randomised(adaptor)
    vectors = []
    for item in range(N):
        vector = torch.zeros(8, dtype=torch.float64)
        for number, name in enumerate(double.vectors):
            if double.present[name][item]:
                adaptor = model.item_encoder.adaptors[name]
                vector = vector + adapted(adaptor, double.vectors[name][item])
            else:
                vector = vector + model.item_encoder.absent[number]
        vectors.append(vector + model.id.weight[item] if ids else vector)
    history = [1, 5, 11, 2]
    raw = torch.stack(vectors)
    state = sasrec_states(model.sequence_encoder, raw[history])[-1]
    expected = functional.cosine_similarity(state[None], raw)
    with torch.no_grad():
        items = model.encode_items(double)
        rows = Sequences(items_BL=torch.tensor([history]), lengths_B=torch.tensor([4]))
        query = model.encode_sequences(items, rows, double)
    torch.testing.assert_close((query @ items.T)[0], expected)


def test_the_contrasts_equal_their_equations() -> None:
    target = torch.tensor([3, 7, 3, 5, 7])
    scale = 1 / 0.07
    table = functional.normalize(torch.randn(N, 4, dtype=torch.float64), dim=1)
    query, copies = functional.normalize(torch.randn(2, 5, 4, dtype=torch.float64), dim=2)
    targets = Targets(item_M=target, row_M=torch.arange(5))
    columns = TargetColumns.of(ItemVectors(vectors_KD=table), targets)

    def expected(keys: Tensor) -> float:
        total = 0.0
        for row in range(5):
            scores = [math.exp(scale * float(query[row] @ key)) for key in keys]
            negatives = sum(scores[j] for j in range(5) if target[j] != target[row])
            total -= math.log(scores[row] / (scores[row] + negatives))
        return total / 5

    next_item = contrast_next_items(query, columns, targets, scale)
    assert next_item.item() == pytest.approx(expected(table[target]))
    sequence = contrast_sequences(query, copies, target, scale)
    assert sequence.item() == pytest.approx(expected(copies))


def test_a_copy_lacks_a_share_of_the_items_and_keeps_order_and_the_oldest() -> None:
    items = torch.arange(1, 51).repeat(400, 1)
    lengths = torch.randint(1, 51, (400,), generator=torch.Generator().manual_seed(0))
    sequences = Sequences(items_BL=items, lengths_B=lengths)
    copies = drop_items(sequences, 0.2, torch.Generator().manual_seed(1))
    for row, length in enumerate(copies.lengths_B.tolist()):
        left = copies.items_BL[row, :length].tolist()
        assert left[0] == 1
        assert left == sorted(set(left))
        assert left[-1] <= lengths[row]
    dropped = 1 - float((copies.lengths_B - 1).sum() / (lengths - 1).sum())
    assert dropped == pytest.approx(0.2, abs=0.02)


def test_pre_training_is_the_weighted_sum_and_reaches_every_parameter() -> None:
    features = worlds.features(N)
    model: Any = worlds.build("unisrec", features, objective="contrast", sequence_weight=0.5)
    rows = Sequences(
        items_BL=torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]]), lengths_B=torch.tensor([4, 3])
    )
    losses = model.loss(worlds.batch(rows, features, torch.Generator()))
    torch.testing.assert_close(losses["loss"], losses["next"] + 0.5 * losses["sequence"])
    losses["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["unisrec", "vqrec"])
def test_a_frozen_encoder_keeps_positions_and_transformer(name: str) -> None:
    model: Any = worlds.build(name, worlds.features(N), freeze=True)
    frozen = {key for key, value in model.named_parameters() if not value.requires_grad}
    prefixes = ("sequence_encoder.position.", "sequence_encoder.transformer.")
    assert frozen == {key for key, _ in model.named_parameters() if key.startswith(prefixes)}


def test_an_item_without_training_interactions_has_no_learned_vector() -> None:
    features = worlds.features(N, missing=False)
    model: Any = worlds.build("unisrec", features, ids=True).eval()
    counts = torch.ones(N, dtype=torch.int64)
    counts[3] = 0
    model.fit_buffers(features, TrainSet(counts_N=counts, keys_J=torch.arange(N)))
    before = model.encode_items(features)
    torch.nn.init.normal_(model.id.weight)
    changed = (model.encode_items(features) != before).any(1)
    assert changed.tolist() == [item != 3 for item in range(N)]
