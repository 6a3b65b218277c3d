from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.trainer import worlds
from tests.trainer.models.test_recommenders import build, sequences
from trainer.data.batches import ItemFeatures, TrainSet
from trainer.kernels.activation_checkpoint import in_pieces, linear
from trainer.kernels.fused_cpu import dropout
from trainer.models import mmsrec

N = 13


def in_one_graph(
    run: Callable[..., Tensor],
    pieces: Sequence[Any],
    parameters: Iterable[nn.Parameter],
    inputs: Sequence[Tensor] = (),
) -> Tensor:
    return torch.cat([run(piece, *inputs) for piece in pieces])


def gradients(model: Any, features: ItemFeatures) -> list[Tensor]:
    rows = sequences([[0, 1, 2, 3, 4, 11], [5, 6], [7, 8, 9, N - 1], [3], [2, 1]])
    torch.manual_seed(1)
    model.zero_grad(set_to_none=True)
    batch = worlds.batch(rows, features, torch.Generator().manual_seed(2))
    seen = batch.sequences
    hidden = torch.rand(seen.items_BL.shape, generator=batch.generator) < 0.3
    chosen = (hidden | (torch.arange(6) == seen.lengths_B[:, None] - 1)) & seen.mask_BL
    queries, order = model._queries(seen, hidden, chosen, features)
    assert sorted(order.tolist()) == [0, 1, 2, 3, 4]
    row_M, column_M = chosen[order].nonzero(as_tuple=True)
    by_slot = (order[row_M] * 6 + column_M).argsort()
    found = queries[by_slot] @ model.encode_items(features).T
    weight = torch.randn(found.shape, generator=batch.generator, dtype=found.dtype)
    (found * weight).sum().backward()
    return [found.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    "options",
    [
        {"missing": "drop"},
        {"missing": "mask"},
        {"ids": True, "whiten": True},
        {"objective": "next", "ids": True},
    ],
)
@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_pieces_give_the_gradients_of_one_graph(
    options: dict[str, Any], probability: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, with the same dropout masks; without dropout equal to the plain form, too."""
    held = worlds.features(N)
    doubled = {name: vectors.double() for name, vectors in held.vectors.items()}
    features = ItemFeatures(n_items=N, vectors=doubled, present=held.present)
    settings = {"dropout": probability, "embed_dropout": probability, **options}
    model: Any = build("mmsrec", features, **settings).double().train()
    model.fit_buffers(features, TrainSet(counts_N=torch.arange(N), keys_J=torch.arange(N)))
    monkeypatch.setattr(mmsrec, "_NUMBERS_IN_ALL", 0)
    monkeypatch.setattr(mmsrec, "_NUMBERS_AT_ONCE", 20 * model.config.dim)
    pieces = gradients(model, features)
    with monkeypatch.context() as patch:
        patch.setattr(mmsrec, "in_pieces", in_one_graph)
        torch.testing.assert_close(pieces, gradients(model, features))
    if not probability:
        monkeypatch.setattr(type(model), "_piece", lambda self, tokens: 0)
        for name in ("trainer.kernels.fused_cpu", "trainer.modules.transformer"):
            monkeypatch.setattr(f"{name}.plain", lambda _: True)
        torch.testing.assert_close(pieces, gradients(model, features))


def test_masks_are_drawn_again_and_the_generator_goes_on_where_it_was() -> None:
    layer, calls = nn.Linear(3, 3), 0

    def run(piece: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return dropout(linear(layer, piece).tanh(), 0.5, training=True)

    x = torch.randn(6, 3)
    torch.manual_seed(0)
    found = in_pieces(run, x.split(2), layer.parameters())
    assert calls == 3
    state = torch.get_rng_state()
    found.sum().backward()
    assert calls == 6
    assert torch.equal(state, torch.get_rng_state())
    assert layer.weight.grad is not None
    wanted = (x.T @ ((found != 0) * 2 * (1 - layer(x).tanh() ** 2))).T
    torch.testing.assert_close(layer.weight.grad, wanted.detach())


def test_a_second_backward_pass_is_refused() -> None:
    layer = nn.Linear(2, 2)
    found = in_pieces(lambda x: linear(layer, x), [torch.ones(1, 2)], layer.parameters()).sum()
    found.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="once"):
        found.backward()


def test_weights_that_changed_in_between_are_noticed() -> None:
    layer = nn.Linear(2, 2)
    found = in_pieces(lambda x: linear(layer, x), [torch.ones(1, 2)], layer.parameters()).sum()
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


def test_frozen_weights_stay_frozen() -> None:
    layer, other = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)
    found = in_pieces(
        lambda x: linear(other, linear(layer, x)),
        [torch.ones(1, 2)],
        [*layer.parameters(), *other.parameters()],
    )
    found.sum().backward()
    assert layer.weight.grad is None
    assert other.weight.grad is not None
