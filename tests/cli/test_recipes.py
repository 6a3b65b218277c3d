"""Every recipe with ``--quick``, to its end, on the demo."""

import json
from pathlib import Path

import pytest

from cli import extract
from features.warehouse import Warehouse
from pipeline.datasets.prepare import PrepareOptions, prepare_dataset
from pipeline.extraction.options import ExtractOptions
from tests.cli.invoke import run
from trainer.runs.recipes import recipe_names


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a warehouse with the demo and its features, which all recipes share."""
    warehouse = Warehouse(tmp_path_factory.mktemp("recipes") / "warehouse")
    prepare_dataset(warehouse, PrepareOptions(dataset="demo"), notify=lambda text: None)
    extract.run_extract(warehouse, "demo", ExtractOptions(image="hashed", text="hashed"))
    return warehouse.root


@pytest.mark.heavy
@pytest.mark.parametrize("name", recipe_names())
def test_a_quick_recipe_runs_to_its_end(name: str, demo: Path, tmp_path: Path) -> None:
    where = ("--warehouse", str(demo), "--out", str(tmp_path / "result.parquet"))
    attributes = ("--set", "attributes=title") if name == "mmsrec/table-3" else ()
    printed = run("grid", name, "--dataset", "demo", "--quick", *attributes, *where, "--json")
    document = json.loads(printed.stdout)
    if isinstance(document, dict):  # else statistics
        assert {entry["state"] for entry in document["runs"]} <= {"finished", "reused"}
