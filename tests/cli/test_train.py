"""The estimate that ``mmrec train`` prints, its budget of memory, and ``--dry-run``."""

import json
import re

import pytest

from cli.options import parse_size
from features.errors import UserError
from features.warehouse import Warehouse
from tests.cli.invoke import run
from tests.trainer import worlds

SMALL = ["dim=8", "heads=2", "hidden=8", "length=5", "epochs=1", "batch_size=16", "device=cpu"]
SETS = [word for setting in SMALL for word in ("--set", setting)]


@pytest.fixture
def world(warehouse: Warehouse) -> Warehouse:
    worlds.prepare(warehouse, [[(user + k) % 20 for k in range(7)] for user in range(40)], 20)
    return warehouse


def train(warehouse: Warehouse, *arguments: str, code: int = 0) -> str:
    return run(
        *("train", "--model", "sasrec", *SETS, "--warehouse", str(warehouse.root), *arguments),
        code=code,
    ).output


def test_a_dry_run_trains_and_writes_nothing(world: Warehouse) -> None:
    shown = train(world, "--dry-run")
    assert re.search(r"memory: about [\d.]+ [GM]B of [\d.]+ [GM]B", shown)
    assert not world.runs()
    report = json.loads(train(world, "--dry-run", "--json").splitlines()[-1])
    assert report["steps"] == 3
    assert report["peak_bytes"] < report["budget_bytes"]


def test_a_training_begins_with_its_estimate(world: Warehouse) -> None:
    shown = train(world, "--name", "first")
    assert shown.index("memory: about") < shown.index("finished")


@pytest.mark.parametrize("arguments", [["--dry-run"], ["--name", "refused"]])
def test_what_does_not_fit_is_refused_before_it_starts(
    world: Warehouse, arguments: list[str]
) -> None:
    shown = train(world, "--memory", "1MB", *arguments, code=1)
    assert "--memory" in shown
    assert not world.runs()
    assert not (world.runs_dir / "refused").exists()


def test_a_size_needs_a_unit() -> None:
    assert parse_size("1.5 GiB") == 1_610_612_736
    for text in ("8", "GB", "-1GB", "8XB", "", "0GB", "0.0001KB", "9" * 400 + "TB"):
        with pytest.raises(UserError, match="8GB"):
            parse_size(text)
