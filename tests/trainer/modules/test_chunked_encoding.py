from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer import worlds
from tests.trainer.models.test_recommenders import build, sequences
from trainer.data.batches import ItemFeatures, TrainSet
from trainer.kernels.dispatch import plain_forms
from trainer.losses import softmax
from trainer.losses.softmax import cross_entropy_reference
from trainer.modules import chunked_encoding

N = 13


def losses_and_gradients(model: Any, features: ItemFeatures) -> list[Tensor]:
    rows = sequences([[0, 1, 2, 3, 4, 11], [5, 6], [7, 8, 9, N - 1], [3, 4], [2, 1]])
    torch.manual_seed(1)
    model.zero_grad(set_to_none=True)
    loss = model.loss(worlds.batch(rows, features, torch.Generator().manual_seed(2)))["loss"]
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("tokens", [1, 20, 60])
@pytest.mark.parametrize(
    "options",
    [
        {"missing": "drop"},
        {"missing": "mask"},
        {"ids": True, "whiten": True},
        {"objective": "next", "ids": True},
    ],
)
def test_chunks_of_mmsrec_give_the_gradients_of_one_graph(
    options: dict[str, Any], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 and without dropout, for chunks of one token, of some, and of most."""
    world = worlds.features(N)
    doubled = {name: vectors.double() for name, vectors in world.vectors.items()}
    features = ItemFeatures(n_items=N, vectors=doubled, present=world.present)
    settings = {"dropout": 0.0, "embed_dropout": 0.0, **options}
    monkeypatch.setattr(softmax, "full_softmax", cross_entropy_reference)  # sums in float64
    model: Any = build("mmsrec", features, **settings).double().train()
    model.fit_buffers(features, TrainSet(counts_N=torch.arange(N), keys_J=torch.arange(N)))
    with plain_forms():
        expected = losses_and_gradients(model, features)
    monkeypatch.setattr(chunked_encoding, "_LEAST_ELEMENTS", 0)
    monkeypatch.setattr(chunked_encoding, "_CHUNK_ELEMENTS", tokens * model.settings.dim)
    torch.testing.assert_close(losses_and_gradients(model, features), expected)
    monkeypatch.setattr(model, "chunks", 3)
    torch.testing.assert_close(losses_and_gradients(model, features), expected)


def test_chunks_are_for_many_tokens_with_gradients_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The transformer is called once for the catalogue, unless it is long enough for chunks."""
    features = worlds.features(N, missing=False)
    model: Any = build("mmsrec", features)
    calls = []
    model.transformer.register_forward_hook(lambda *call: calls.append(1))

    def count() -> int:
        calls.clear()
        model.encode_items(features)
        return len(calls)

    assert count() == 1
    monkeypatch.setattr(chunked_encoding, "_LEAST_ELEMENTS", 0)
    monkeypatch.setattr(chunked_encoding, "_CHUNK_ELEMENTS", 4 * 2 * model.settings.dim)
    assert count() == 4  # of at most 4 items, with 2 tokens each
    with torch.no_grad():
        assert count() == 1
    with plain_forms():
        assert count() == 1
