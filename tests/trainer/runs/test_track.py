"""Trackers and trainings: a training is the same with and without them, and survives them."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from features import extras
from features.errors import UserError
from features.warehouse import Warehouse
from tests.cli.invoke import run as command
from tests.trainer import worlds
from tests.trainer.tracking.tracked import WORLD, train, weights
from trainer.data.batches import Batch
from trainer.tasks.next_item import NextItem
from trainer.tracking.base import TrackedRun, Tracker
from trainer.tracking.registry import TRACKERS, TrackerEntry, check_trackers

ROOT = Path(__file__).parents[3]
OWN = TrackerEntry(path=f"{__name__}:Recorder", module="torch", distribution="torch")


class Recorder(Tracker):
    """Keep the calls, draw random numbers, and fail where :attr:`fails` names it."""

    calls: ClassVar[list[str]] = []
    fails: ClassVar[str] = ""

    def __init__(self, run: TrackedRun) -> None:
        self.settings = run.settings
        self._call("init")

    @property
    def view(self) -> str:
        self._call("view")
        return "recorded"

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        self._call(f"log {epoch}")

    def finish(self, table: Mapping[str, float], *, is_finished: bool) -> None:
        self._call(f"finish {len(table) > 0} {is_finished}")

    def _call(self, name: str) -> None:
        torch.rand(3)
        if self.fails and name.startswith(self.fails):
            raise OSError(28, "No space left\non device")
        self.calls.append(name)


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRACKERS, "recorder", OWN)
    monkeypatch.setattr(TrackerEntry, "load", load_here)
    monkeypatch.setattr(Recorder, "calls", [])


_load = TrackerEntry.load


def load_here(entry: TrackerEntry) -> type[Tracker]:
    return Recorder if entry is OWN else _load(entry)


def test_a_tracker_does_not_change_the_training(warehouse: Warehouse) -> None:
    plain, report, _ = train(warehouse, [], "plain")
    tracked, again, lines = train(warehouse, ["recorder"], "tracked")
    assert Recorder.calls == ["init", "log 1", "log 2", "log 3", "finish True True", "view"]
    assert lines == ["tracked by recorder: recorded"]
    assert again.best == report.best
    expected, values = weights(plain), weights(tracked)
    assert expected.keys() == values.keys()
    assert all(torch.equal(expected[name], values[name]) for name in expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
@pytest.mark.slow
def test_no_tracker_changes_the_training(name: str, warehouse: Warehouse) -> None:
    pytest.importorskip(TRACKERS[name].module, reason=f"the extra {name} is not installed")
    plain, tracked = train(warehouse, [], "plain")[0], train(warehouse, [name], "tracked")[0]
    expected, values = weights(plain), weights(tracked)
    assert all(torch.equal(expected[key], values[key]) for key in expected)


@pytest.mark.parametrize("fails", ["init", "log 1", "log 3", "finish", "view"])
def test_a_tracker_that_fails_is_one_line_and_the_training_goes_on(
    fails: str, warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recorder, "fails", fails)
    _, report, lines = train(warehouse, ["recorder"])
    assert report.finished
    assert report.epochs == 3
    (line,) = lines
    assert "recorder" in line
    assert "No space left on device" in line


def test_trackers_are_closed_when_a_training_fails(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = NextItem.loss

    def diverge(self: NextItem, batch: Batch) -> dict[str, torch.Tensor]:
        return {name: value * torch.nan for name, value in loss(self, batch).items()}

    monkeypatch.setattr(NextItem, "loss", diverge)
    with pytest.raises(UserError, match="lower lr"):
        train(warehouse, ["recorder"])
    assert Recorder.calls[-2:] == ["finish False False", "view"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
@pytest.mark.parametrize("line", ["train", "pretrain"])
def test_an_absent_extra_is_one_line_that_names_it(
    line: str, name: str, warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda module: None)
    worlds.prepare(warehouse, WORLD, 6)
    place = ("--warehouse", str(warehouse.root))
    printed = command(line, "--model", "sasrec", "--track", name, *place, code=2).stderr
    assert f"pip install 'mmrec[{name}]'" in printed
    assert len(printed.splitlines()) == 1
    assert warehouse.runs() == []


@pytest.mark.parametrize(
    ("names", "named"), [(["tensorbord"], "tensorboard"), (["recorder", "recorder"], "twice")]
)
def test_wrong_names_are_refused(names: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        check_trackers(names)


def test_the_command_tracks_a_training_and_its_resumption(warehouse: Warehouse) -> None:
    worlds.prepare(warehouse, WORLD, 6)
    place = ("--warehouse", str(warehouse.root))
    small = ("--set", "dim=8", "--set", "epochs=2", "--set", "device=cpu", "--name", "a")
    first = command("train", "--model", "sasrec", *small, "--track", "recorder", *place)
    assert "tracked by recorder" in first.stderr
    assert Recorder.calls == ["init", "log 1", "log 2", "finish True True", "view"]
    command("train", "--resume", "--track", "recorder", *place)
    assert Recorder.calls[5:] == ["init", "finish True True", "view"]


@pytest.mark.slow
def test_a_training_without_trackers_imports_none() -> None:
    code = (
        "import sys, trainer.runs.track, cli.training_options\n"
        "tools = {'tensorboard', 'torch.utils.tensorboard', 'wandb', 'mlflow'} & set(sys.modules)\n"
        "sys.exit(f'imports {tools}' if tools else 0)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
