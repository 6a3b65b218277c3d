"""The estimate of memory and time before a training."""

import re
from pathlib import Path

import pytest
import torch

from features.errors import OutOfMemoryError
from features.warehouse import Warehouse
from tests.trainer import worlds
from trainer.data.batches import Batch
from trainer.runs.estimate import estimate_training
from trainer.runs.run import Run, plan_run
from trainer.runs.spec import RunSpec
from trainer.setting_sources import SettingSources

N = 300


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    warehouse = Warehouse(tmp_path / "warehouse")
    sequences = [[(7 * user + k) % N for k in range(4 + user % 9)] for user in range(200)]
    worlds.prepare(warehouse, sequences, N)
    worlds.extract(warehouse, worlds.features(N))
    return warehouse


def planned(warehouse: Warehouse, model: str, **settings: object) -> Run:
    pairs = [f"{key}={value}" for key, value in (worlds.small_pairs(model) | settings).items()]
    spec = RunSpec.resolve(warehouse, model, ["world"], sources=SettingSources(pairs=pairs))
    return plan_run(warehouse, spec)


@pytest.mark.parametrize("model", ["sasrec", "mmsrec", "mmsr", "pmmrec", "bert4rec", "carca"])
def test_an_estimate_changes_nothing(warehouse: Warehouse, model: str) -> None:
    run = planned(warehouse, model)
    before = {name: x.clone() for name, x in run.model.state_dict().items()}
    torch.manual_seed(3)
    estimate = estimate_training(run)
    after_estimate = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(after_estimate, torch.rand(3))
    assert estimate is not None
    assert estimate.steps > 0
    assert 0 < estimate.peak_bytes < estimate.budget_bytes
    assert all(parameter.grad is None for parameter in run.model.parameters())
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not warehouse.runs()


def test_a_model_without_gradients_has_no_estimate(warehouse: Warehouse) -> None:
    assert estimate_training(planned(warehouse, "popularity")) is None


def test_too_little_memory_names_what_is_needed(warehouse: Warehouse) -> None:
    with pytest.raises(OutOfMemoryError, match=r"--memory.* [\d,.]+ .B,"):
        estimate_training(planned(warehouse, "sasrec"), 1000)


def test_the_memory_that_is_named_is_enough(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = planned(warehouse, "sasrec")
    monkeypatch.setattr("trainer.runs.estimate.resident_memory", lambda: 1_210_000_000)
    with pytest.raises(OutOfMemoryError, match="--memory") as refused:
        estimate_training(run, 1_200_000_000)
    named = re.search(r"at least ([\d.]+) GB", str(refused.value))
    assert named is not None
    assert estimate_training(run, round(float(named[1]) * 1e9)) is not None


def test_the_step_of_a_known_size_is_measured(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = planned(warehouse, "sasrec")
    plain = estimate_training(run)
    loss = run.task.loss

    def large_loss(batch: Batch) -> dict[str, torch.Tensor]:
        losses = loss(batch)
        held = losses["loss"].expand(25_000_000).exp()  # 100 MB, kept for the backward pass
        return losses | {"loss": losses["loss"] + 0 * held.sum()}

    monkeypatch.setattr(run.task, "loss", large_loss)
    large = estimate_training(run)
    assert plain is not None
    assert large is not None
    assert 0.9e8 < large.peak_bytes - plain.peak_bytes < 3.5e8


def test_a_step_over_the_budget_names_a_batch_that_fits(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = planned(warehouse, "sasrec", batch_size=64)
    loss = run.task.loss
    estimate = estimate_training(run)
    assert estimate is not None

    def loss_by_rows(batch: Batch) -> dict[str, torch.Tensor]:
        losses = loss(batch)
        held = losses["loss"].expand(len(batch.users_B) * 2_500_000).exp()  # 10 MB a row
        return losses | {"loss": losses["loss"] + 0 * held.sum()}

    monkeypatch.setattr(run.task, "loss", loss_by_rows)
    budget = estimate.peak_bytes + 800_000_000
    with pytest.raises(OutOfMemoryError, match="batch_size=") as refused:
        estimate_training(run, budget)
    named = re.search(r"--set batch_size=(\d+)", str(refused.value))
    assert named is not None
    smaller = planned(warehouse, "sasrec", batch_size=int(named[1]))
    monkeypatch.setattr(smaller.task, "loss", loss_by_rows)
    assert estimate_training(smaller, budget) is not None
    assert 4 <= int(named[1]) < 64
