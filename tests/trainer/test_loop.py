import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from features.errors import UserError
from tests.trainer import worlds
from trainer.checkpoint import Progress, load_weights
from trainer.config import TrainConfig
from trainer.data import TrainingData
from trainer.loop import EpochRow, Tick, fit
from trainer.models import MODELS
from trainer.recommender import Catalogue, Recommender

N = 12
SMALL: dict[str, dict[str, Any]] = {
    "sasrec": {"dim": 8, "hidden": 16, "length": 5},
    "mmsrec": {"dim": 8, "heads": 2, "hidden": 16, "length": 5, "dropout": 0.1},
}


def world(name: str) -> tuple[Recommender, TrainingData]:
    features = worlds.features(N)
    settings, recommender = MODELS[name].load()
    torch.manual_seed(0)
    model = recommender(settings(**SMALL[name]), Catalogue(n_items=N, widths=features.widths))
    return model, worlds.training_data(worlds.cycles(n_items=N), features)


def train(
    name: str,
    folder: Path,
    *,
    resume: bool = False,
    interrupt_at: int | None = None,
    **settings: Any,
) -> tuple[Progress, Recommender, list[EpochRow]]:
    model, data = world(name)
    folder.mkdir(exist_ok=True)
    rows: list[EpochRow] = []
    ticks = 0

    def on_tick(tick: Tick) -> None:
        nonlocal ticks
        ticks += 1
        if ticks == interrupt_at:
            signal.raise_signal(signal.SIGINT)

    config = TrainConfig(**{"epochs": 4, "batch_size": 16, "device": "cpu", **settings})
    progress = fit(
        model, data, config, folder, {"a": 1}, resume=resume, on_epoch=rows.append, on_tick=on_tick
    )
    return progress, model, rows


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("interrupt_at", [1, 7, 11])
def test_a_resumed_run_ends_where_the_whole_one_does_to_the_bit(
    name: str, interrupt_at: int, tmp_path: Path
) -> None:
    whole, model, rows = train(name, tmp_path / "whole")
    stopped, _, _ = train(name, tmp_path / "torn", interrupt_at=interrupt_at)
    assert not stopped.finished
    torch.manual_seed(99)  # whatever the process drew before
    resumed, other, more = train(name, tmp_path / "torn", resume=True)
    assert resumed == whole
    assert more == rows[-len(more) :]
    for (key, mine), theirs in zip(
        model.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), key
    best = [(tmp_path / f / "model.safetensors").read_bytes() for f in ("whole", "torn")]
    assert best[0] == best[1]


def test_seeds_fix_everything(tmp_path: Path) -> None:
    rows = [train("mmsrec", tmp_path / str(i))[2] for i in range(2)]
    other = train("mmsrec", tmp_path / "other", seed=1)[2]
    assert rows[0] == rows[1]
    assert other != rows[0]


def test_order_is_learned(tmp_path: Path) -> None:
    """In a world where i is followed by i + 1, the id model finds it; popularity cannot."""
    progress, _, rows = train("sasrec", tmp_path / "run", epochs=60, lr=1e-2)
    assert progress.best > 0.95
    assert rows[-1].loss < rows[0].loss / 2


def test_early_stopping_keeps_the_best(tmp_path: Path) -> None:
    progress, model, rows = train("sasrec", tmp_path / "run", epochs=200, lr=1e-2, patience=2)
    values = [row.metrics["masked", "HR@10"] for row in rows]
    assert progress.finished
    assert len(rows) < 200
    assert progress.best == max(values)
    assert progress.best_epoch == values.index(max(values)) + 1
    assert len(rows) == progress.best_epoch + 2
    load_weights(tmp_path / "run" / "model.safetensors", model, {"a": 1})


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    _, model, _ = train("sasrec", tmp_path / "run", epochs=1)
    with pytest.raises(UserError, match="written for a=1, not 2"):
        load_weights(tmp_path / "run" / "model.safetensors", model, {"a": 2})
    with pytest.raises(UserError, match="is not there"):
        load_weights(tmp_path / "none.safetensors", model, {"a": 1})
    (tmp_path / "bad.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match="is damaged"):
        load_weights(tmp_path / "bad.safetensors", model, {"a": 1})


def test_a_loss_that_is_no_number_stops_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a number in epoch 1"):
        train("sasrec", tmp_path / "run", lr=1e30, clip=0.0, epochs=5)


def test_nothing_to_learn_from(tmp_path: Path) -> None:
    features = worlds.features(N)
    settings, recommender = MODELS["sasrec"].load()
    model = recommender(settings(), Catalogue(n_items=N, widths={}))
    data = worlds.training_data(worlds.dataset([[1], [2]], N), features)
    with pytest.raises(UserError, match="no user has two training interactions"):
        fit(
            model, data, TrainConfig(), tmp_path, {},
            on_epoch=lambda row: None, on_tick=lambda tick: None,
        )  # fmt: skip
