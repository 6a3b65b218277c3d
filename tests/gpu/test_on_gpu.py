"""What must hold on a GPU: it computes what the CPU computes, and trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.gpu import agreement, syncs, world
from tests.gpu.parts import Setup
from tests.trainer import worlds
from trainer.data.batches import Batch
from trainer.loop import fit
from trainer.losses.clip import in_batch_symmetric
from trainer.losses.in_batch import Columns, ExcludedLabels, in_batch
from trainer.models.registry import MODELS
from trainer.models.sasrec import SASRec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SMALL = Setup(device="cuda", small=True, seconds=60)


@pytest.mark.parametrize("name", [*MODELS])
def test_loss_and_gradients_of_a_model(name: str) -> None:
    if not worlds.build(name, worlds.features(8)).learns_by_gradients:
        pytest.skip("it has no parameters")
    loss, gradient = agreement.differences(name, "cuda")
    assert loss <= agreement.BOUND
    assert gradient <= agreement.BOUND


def factors(count: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        functional.normalize(torch.randn(count, width, generator=generator), dim=1)
        for _ in range(2)
    ]


def operator(x_BD: Tensor, y_BD: Tensor, way: str) -> Tensor:
    count, device = len(x_BD), x_BD.device
    label_B = (torch.arange(count) // 3).to(device)
    if way == "symmetric":
        return in_batch_symmetric(x_BD, y_BD, scale=20.0)
    if way == "symmetric, labels":
        return in_batch_symmetric(x_BD, y_BD, scale=20.0, label_B=label_B)
    columns = Columns(
        label_C=label_B,
        correction_C=torch.linspace(-3, 0, count).to(device),
        count_C=(torch.arange(count) % 4).to(device),
    )
    own_UJ = torch.tensor([[0, 1, -1], [2, -1, -1]]).to(device)
    owner_M = (torch.arange(count) % 2).to(device)
    excluded = ExcludedLabels(own_UJ=own_UJ, owner_M=owner_M) if way == "excluded" else None
    positive_M = torch.arange(count).to(device)
    return in_batch(x_BD, y_BD, positive_M, scale=20.0, columns=columns, excluded=excluded)


@pytest.mark.parametrize("way", ["symmetric", "symmetric, labels", "columns", "excluded"])
def test_the_in_batch_operator(way: str) -> None:
    results = []
    for device in ("cpu", "cuda"):
        x_BD, y_BD = (x.to(device).requires_grad_() for x in factors(300, 16))
        loss = operator(x_BD, y_BD, way)
        loss.backward()
        assert x_BD.grad is not None
        assert y_BD.grad is not None
        results.append([loss.detach().cpu(), x_BD.grad.cpu(), y_BD.grad.cpu()])
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", ["sasrec", "mmsrec", "mmsr", "pmmrec"])
def test_a_training_with_its_validation(name: str, precision: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    pairs = (*world.SMALL_PAIRS, "epochs=1", f"precision={precision}")
    task, config = world.next_item(name, world.training_data(SMALL), pairs)
    rows: list[Any] = []
    state = fit(task, config, tmp_path, {}, on_epoch=rows.append, on_progress=lambda _: None)
    assert state.finished
    assert rows[0].losses["loss"] > 0
    assert 0 <= rows[0].metrics["filtered", "NDCG@10"] <= 1


def test_a_planted_wait_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    task, config = world.next_item("sasrec", world.training_data(SMALL), world.SMALL_PAIRS)
    before = syncs.count_waits(SMALL, task, config)["waits a step"]
    loss = SASRec.loss

    def waits(self: SASRec, batch: Batch) -> dict[str, Tensor]:
        terms = loss(self, batch)
        terms["loss"].item()
        return terms

    monkeypatch.setattr(SASRec, "loss", waits)
    assert syncs.count_waits(SMALL, task, config)["waits a step"] > before
