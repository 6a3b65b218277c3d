"""The scripts of cli/examples/ run as they are."""

import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from features.warehouse import Warehouse
from tests.trainer import worlds
from trainer.models.registry import MODELS, Model
from trainer.runs.train import train_run

FOLDER = Path(__file__).parents[2] / "cli" / "examples"
LONGEST = 80  # lines


def test_every_script_is_short() -> None:
    scripts = sorted(FOLDER.glob("*.py"))
    assert [path.name for path in scripts] == ["own_catalogue.py", "own_model.py"]
    assert all(len(path.read_text().splitlines()) <= LONGEST for path in scripts)


@pytest.mark.slow
def test_a_catalogue_of_ones_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "own_catalogue.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(FOLDER.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    values = {line.split()[0]: float(line.split()[3]) for line in lines if " filtered " in line}
    assert values["ids"] > 0.9  # the ten products of one colour
    assert values["texts"] > 0.9
    assert lines[-1].count("item_id='red-") >= 4  # of five; six of the other reds remain


def test_a_model_of_ones_own(warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry point of a package is tested in tests/trainer/test_readme.py."""
    spec = spec_from_file_location("own_model", FOLDER / "own_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "own_model", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(MODELS, "recent", Model("own_model:Recent", "The last items."))
    items = 12
    worlds.prepare(warehouse, [[i, i + 1, i + 2, i + 3, i + 4] for i in range(8)], items)
    worlds.extract(warehouse, worlds.features(items))
    settings = ["epochs=20", "dim=16", "lr=0.05", "device=cpu", "monitor=HR@5"]
    report = train_run(worlds.begin(warehouse, "recent", settings=settings))
    assert report.finished
    assert report.best > 0.7  # a random ranking has 5 of 12
