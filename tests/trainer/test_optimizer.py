"""Updates of the rows of item vectors that a step reads."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from features.warehouse import Warehouse
from tests.trainer import worlds
from trainer.checkpoint import TrainState
from trainer.config import TrainConfig
from trainer.models.base import Recommender
from trainer.optimizer import Optimizer
from trainer.runs import settings as run_settings
from trainer.runs.run import open_run
from trainer.runs.spec import RunSpec
from trainer.runs.train import train_run

N = 40
MODELS_WITH_ROWS: list[tuple[str, dict[str, Any]]] = [
    ("sasrec", {"candidates": 8}),
    ("sasrec", {"candidates": 8, "score": "cosine"}),
    ("sasrec", {"loss": "bce"}),
    ("gru4rec", {"loss": "bpr-max", "tied": False}),
    ("idsr", {}),
    ("mmsrec", {"candidates": 8, "ids": True}),
]


def read_rows(model: Recommender, batch: Any) -> dict[str, set[int]]:
    """Compute gradients, and return the rows of each sparse gradient."""
    model.loss(batch)["loss"].backward()
    return {
        name: set(parameter.grad.coalesce().indices()[0].tolist())
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.is_sparse
    }


def first_batch(model: Recommender) -> Any:
    data = worlds.training_data(worlds.cycles(n_items=N), worlds.features(N))
    return next(data.epoch(model.window_sampling, batch_size=4, seed=0, epoch=0)[1])


@pytest.mark.parametrize(("name", "settings"), MODELS_WITH_ROWS)
def test_a_step_changes_only_the_rows_that_it_reads(name: str, settings: dict[str, Any]) -> None:
    model = worlds.build(name, worlds.features(N), **settings)
    optimizer = Optimizer(model, TrainConfig(item_updates="rows"))
    before = {key: value.clone() for key, value in model.named_parameters()}
    optimizer.prepare(TrainState(), 10)
    rows = read_rows(model, first_batch(model))
    optimizer.clip()
    optimizer.step()
    assert rows
    for key, indices in rows.items():
        changed = (dict(model.named_parameters())[key] != before[key]).any(1)
        assert 0 < len(indices) < N
        assert set(changed.nonzero()[:, 0].tolist()) <= indices


def test_a_loss_over_the_catalogue_has_no_rows() -> None:
    model = worlds.build("sasrec", worlds.features(N), candidates=0)
    assert Optimizer(model, TrainConfig(item_updates="rows")).rows is None


def weights_after(item_updates: str, steps: int = 3, **settings: Any) -> dict[str, Tensor]:
    model = worlds.build("sasrec", worlds.features(N), dropout=0.0, **settings)
    config = TrainConfig(item_updates=item_updates, weight_decay=0.0, clip=0.1)
    optimizer = Optimizer(model, config)
    for step in range(steps):
        optimizer.prepare(TrainState(step=step, steps=step), steps)
        data = worlds.training_data(worlds.cycles(n_items=N), worlds.features(N))
        _, batches = data.epoch(model.window_sampling, batch_size=60, seed=0, epoch=step)
        model.loss(next(batches))["loss"].backward()
        optimizer.clip()
        optimizer.step()
    return dict(model.state_dict())


def test_rows_equal_all_where_each_step_reads_every_item() -> None:
    """With a candidate for each item, each row has a gradient in each step.

    AdamW and SparseAdam add epsilon to differently scaled roots, so tiny gradients differ.
    """
    initial = dict(worlds.build("sasrec", worlds.features(N), candidates=N).state_dict())
    rows, dense = (weights_after(kind, candidates=N) for kind in ("rows", "all"))
    for name, weight in dense.items():
        update, other = weight - initial[name], rows[name] - initial[name]
        assert (update - other).abs().mean() < 0.01 * update.abs().mean()


def begin(warehouse: Warehouse, name: str, *settings: str) -> Any:
    pairs = ["epochs=2", "batch_size=8", "dim=8", "heads=2", "hidden=16", "length=5", *settings]
    return worlds.begin(warehouse, "sasrec", settings=pairs, name=name)


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    warehouse = Warehouse(tmp_path / "warehouse")
    sequences = [[(user + k) % N for k in range(8)] for user in range(60)]
    worlds.prepare(warehouse, sequences, N)
    return warehouse


def test_small_catalogues_have_the_exact_softmax(warehouse: Warehouse) -> None:
    spec = begin(warehouse, "small").spec
    assert (spec.settings.candidates, spec.train.item_updates) == (0, "all")
    assert spec.identity()["model"]["candidates"] == 0
    text = (warehouse.runs_dir / "small" / "config.toml").read_text()
    assert "candidates = 0" in text
    assert not [change for change in spec.document()["run"]["changed"] if "candidates" in change]


def test_large_catalogues_have_candidates_and_rows(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_settings, "EXACT_ITEMS", N - 1)
    monkeypatch.setattr(run_settings, "CANDIDATES", 16)
    spec = begin(warehouse, "large").spec
    assert (spec.settings.candidates, spec.train.item_updates) == (16, "rows")
    again = RunSpec.read(warehouse, warehouse.runs_dir / "large")
    assert again.identity() == spec.identity()
    exact = begin(warehouse, "exact", "candidates=0", "item_updates=all").spec
    assert (exact.settings.candidates, exact.train.item_updates) == (0, "all")
    in_batch = begin(warehouse, "in-batch", "loss=in-batch", "candidates=auto").spec
    assert in_batch.settings.candidates == 0


def test_a_resumed_run_with_rows_gives_the_same_bits(warehouse: Warehouse) -> None:
    pairs = ("item_updates=rows", "candidates=16")
    whole = begin(warehouse, "whole", *pairs)
    train_run(whole)
    stopped = begin(warehouse, "stopped", *pairs)

    class StoppedError(Exception):
        pass

    def stop_in_the_second_epoch(progress: Any) -> None:
        if progress.epoch == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        train_run(stopped, on_progress=stop_in_the_second_epoch)
    train_run(open_run(warehouse, stopped.folder), resume=True)
    files = [(run.folder / "model.safetensors").read_bytes() for run in (whole, stopped)]
    assert files[0] == files[1]
