from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainer import worlds
from tests.trainer.models.test_recommenders import build, sequences
from trainer.data.batches import ItemFeatures, TrainSet
from trainer.kernels.activation_checkpoint import checkpoint_elementwise, tokens_per_chunk
from trainer.kernels.dispatch import plain_forms
from trainer.kernels.elementwise import dropout
from trainer.losses import softmax
from trainer.losses.softmax import cross_entropy_reference
from trainer.modules import chunked_encoding

N = 13


class CountProducts(TorchDispatchMode):
    """Count the matrix products that run inside the context."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def losses_and_gradients(model: Any, features: ItemFeatures) -> list[Tensor]:
    rows = sequences([[0, 1, 2, 3, 4, 11], [5, 6], [7, 8, 9, N - 1], [3, 4], [2, 1]])
    torch.manual_seed(1)
    model.zero_grad(set_to_none=True)
    loss = model.loss(worlds.batch(rows, features, torch.Generator().manual_seed(2)))["loss"]
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


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
def test_chunks_of_mmsrec_give_the_gradients_of_one_graph(
    options: dict[str, Any], probability: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, with the same dropout masks; without dropout also equal to the plain forms."""
    world = worlds.features(N)
    doubled = {name: vectors.double() for name, vectors in world.vectors.items()}
    features = ItemFeatures(n_items=N, vectors=doubled, present=world.present)
    settings = {"dropout": probability, "embed_dropout": probability, **options}
    monkeypatch.setattr(softmax, "full_softmax", cross_entropy_reference)  # sums in float64
    model: Any = build("mmsrec", features, **settings).double().train()
    model.fit_buffers(features, TrainSet(counts_N=torch.arange(N), keys_J=torch.arange(N)))
    if not probability:
        with plain_forms():
            expected = losses_and_gradients(model, features)
    monkeypatch.setattr(chunked_encoding, "tokens_per_chunk", lambda weight, tokens: 20)
    chunked = losses_and_gradients(model, features)
    if probability:
        monkeypatch.setattr(
            chunked_encoding, "checkpoint_elementwise", lambda run, *inputs: run(*inputs)
        )
        expected = losses_and_gradients(model, features)
    torch.testing.assert_close(chunked, expected)


def test_masks_are_drawn_again_and_the_generator_keeps_its_state() -> None:
    layer, calls = nn.Linear(3, 3), 0

    def run(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return dropout(layer(x).tanh(), 0.5, training=True)

    x = torch.randn(6, 3)
    torch.manual_seed(0)
    output = torch.cat([checkpoint_elementwise(run, piece) for piece in x.split(2)])
    assert calls == 3
    state = torch.get_rng_state()
    output.sum().backward()
    assert calls == 6
    assert torch.equal(state, torch.get_rng_state())
    assert layer.weight.grad is not None
    expected = (x.T @ ((output != 0) * 2 * (1 - layer(x).tanh() ** 2))).T
    torch.testing.assert_close(layer.weight.grad, expected.detach())


def test_the_backward_pass_does_not_repeat_the_matrix_products_of_the_forward_pass() -> None:
    layers = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3, bias=False), nn.Tanh())
    x = torch.randn(5, 3)
    counts = []
    for checkpointed in (False, True):
        output = checkpoint_elementwise(layers, x) if checkpointed else layers(x)
        with CountProducts() as products:  # type: ignore[no-untyped-call]
            output.sum().backward()
        counts.append(products.count)
    assert counts[0] == counts[1] == 3  # two gradients of weights, one of an input


def test_frozen_weights_stay_frozen() -> None:
    frozen, trained = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)
    output = checkpoint_elementwise(lambda x: trained(frozen(x)), torch.ones(1, 2))
    output.sum().backward()
    assert frozen.weight.grad is None
    assert trained.weight.grad is not None


def test_chunks_are_for_many_tokens_with_gradients_on_a_cpu() -> None:
    weight = torch.zeros(512)
    assert tokens_per_chunk(weight, 10_000) == 1024
    assert tokens_per_chunk(weight, 1000) == 0
    with torch.no_grad():
        assert tokens_per_chunk(weight, 10_000) == 0
    with plain_forms():
        assert tokens_per_chunk(weight, 10_000) == 0
    assert tokens_per_chunk(weight.to("meta"), 10_000) == 0
