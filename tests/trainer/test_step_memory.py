"""Steps in chunks give the loss and the gradients of the whole step."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer import worlds
from trainer.config import TrainConfig
from trainer.data.batches import Batch
from trainer.loop import TrainProgress, fit
from trainer.models.base import Recommender
from trainer.models.registry import MODELS
from trainer.tasks.next_item import NextItem

N = 30
WITHOUT_DROPOUT = {
    "dropout": 0.0, "embed_dropout": 0.0, "state_dropout": 0.0, "adaptor_dropout": 0.0,
    "input_dropout": 0.0, "noise": False,
}  # fmt: skip
MORE_MODELS = ("vqrec", "bsarec", "duorec", "fmrlrec", "idsr", "morec", "nextitnet", "s3rec")
CASES: list[tuple[str, dict[str, Any]]] = [
    ("sasrec", {}),
    ("sasrec", {"candidates": 8, "score": "cosine"}),
    ("sasrec", {"loss": "in-batch"}),
    ("sasrec", {"loss": "bce", "rows": "prefixes"}),
    ("gru4rec", {"loss": "bpr-max", "tied": False}),
    ("mmsr", {}),
    ("mmsr", {"loss": "softmax"}),
    ("pmmrec", {}),
    ("pmmrec", {"align": "nicl", "nid": True, "rcl": True}),
    ("mmsrec", {}),
    ("mmsrec", {"candidates": 8, "ids": True}),
    ("mmsrec", {"loss": "in-batch", "objective": "next"}),
    *(
        (name, {})
        for name in ("vqrec", "bsarec", "duorec", "fmrlrec", "idsr", "morec", "nextitnet")
    ),
    ("s3rec", {}),
]


def build(name: str, settings: dict[str, Any]) -> Recommender:
    known = {field.name for field in fields(MODELS.find(name).load().settings_class)}
    off = {key: value for key, value in WITHOUT_DROPOUT.items() if key in known}
    return worlds.build(name, worlds.features(N), **off | settings)


def gradients(model: Recommender, chunks: int) -> tuple[float, dict[str, Tensor]]:
    features = worlds.features(N)
    features = replace(features, vectors={k: x.double() for k, x in features.vectors.items()})
    data = worlds.training_data(worlds.cycles(n_items=N), features)
    batch = next(data.epoch(model.window_sampling, batch_size=16, seed=0, epoch=0)[1])
    model.chunks = chunks
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    loss = model.loss(batch)["loss"]
    loss.backward()
    named = model.named_parameters()
    return float(loss.detach()), {key: p.grad.clone() for key, p in named if p.grad is not None}


@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.parametrize("chunks", [2, 5, 64])
def test_chunks_equal_the_whole_step(name: str, settings: dict[str, Any], chunks: int) -> None:
    model = build(name, settings).double()  # float32 rounds differently in chunks
    assert model.takes_chunks
    loss, whole = gradients(model, 1)
    loss_in_chunks, in_chunks = gradients(model, chunks)
    assert loss_in_chunks == pytest.approx(loss, rel=1e-5)
    assert in_chunks.keys() == whole.keys()
    joined, expected = (torch.cat([g.flatten() for g in x.values()]) for x in (in_chunks, whole))
    assert (joined - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sasrec", {}),
        ("mmsrec", {}),
        ("mmsrec", {"objective": "next", "item_dropout": False, "attention_dropout": False}),
    ],
)
def test_chunks_are_recomputed_with_the_same_dropout(name: str, settings: dict[str, Any]) -> None:
    """The change of the loss along its gradient is the squared norm of the gradient."""
    model = worlds.build(name, worlds.features(N), dropout=0.5, **settings).double()
    _, direction = gradients(model, 5)
    squared = sum(float(g.square().sum()) for g in direction.values())
    parameters, step, changed = dict(model.named_parameters()), 1e-4 / squared**0.5, []
    for sign in (1, -2):
        with torch.no_grad():
            for key, g in direction.items():
                parameters[key].add_(g, alpha=sign * step)
        changed.append(gradients(model, 5)[0])
    assert (changed[0] - changed[1]) / (2 * step) == pytest.approx(squared, rel=5e-2)


def train(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, needed: int
) -> tuple[Recommender, list[TrainProgress]]:
    """Train a model whose steps run out of memory in fewer than ``needed`` chunks."""
    model = build(name, {"loss": "in-batch"})
    data = worlds.training_data(worlds.cycles(n_items=N), worlds.features(N))
    task, reports = NextItem(model, data), list[TrainProgress]()
    loss = task.loss

    def planted(batch: Batch) -> dict[str, Tensor]:
        losses = loss(batch)
        if model.chunks < needed:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses

    monkeypatch.setattr(task, "loss", planted)
    folder.mkdir()
    config = TrainConfig(epochs=1, batch_size=16, device="cpu")
    fit(task, config, folder, {}, on_epoch=lambda row: None, on_progress=reports.append)
    return model, reports


@pytest.mark.parametrize("name", ["sasrec", "mmsrec", "pmmrec"])
def test_a_training_that_runs_out_of_memory_goes_on_in_chunks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = train(tmp_path / "whole", monkeypatch, name, 1)
    model, reports = train(tmp_path / "chunks", monkeypatch, name, 4)
    assert {report.chunks for report in reports} == {4}
    for key, weight in whole.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], weight, rtol=1e-3, atol=1e-4)


def test_a_step_that_never_fits_ends_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        train(tmp_path / "never", monkeypatch, "sasrec", 10**9)
