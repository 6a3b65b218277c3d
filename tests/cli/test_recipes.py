"""Every recipe has the rows and columns of its table, and runs with ``--quick`` to its end."""

import re
from pathlib import Path

import pytest

from cli import console, extract
from cli.grid_tables import show_pivot
from features.warehouse import Warehouse
from pipeline.datasets.prepare import PrepareOptions, prepare_dataset
from pipeline.extraction.options import ExtractOptions
from tests.cli.invoke import run
from tests.cli.paper_tables import PAPER_TABLES, STATISTICS, check_printed
from trainer.runs.grid_table import pivot
from trainer.runs.recipes import fill_recipe, read_recipe, recipe_names


@pytest.fixture
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the terminal so wide that no table is divided."""
    monkeypatch.setattr(type(console.out), "width", 400)


def test_every_recipe_has_a_table_of_its_paper() -> None:
    assert {*PAPER_TABLES, *STATISTICS} == set(recipe_names())


@pytest.mark.usefixtures("_wide")
@pytest.mark.parametrize("name", PAPER_TABLES)
def test_a_recipe_prints_the_rows_and_columns_of_the_paper(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = read_recipe(name)
    has_sources = "{source" in str(recipe.document.get("pretrain"))
    grid = fill_recipe(recipe, ["demo"], ["demo"] if has_sources else [])
    values = [
        dict.fromkeys(grid.metrics, 0.1 + number / 100)
        for number, _ in enumerate(grid.combinations)
    ]
    show_pivot(grid, pivot(grid, values), ["demo"])
    check_printed(capsys.readouterr().out, PAPER_TABLES[name])


@pytest.mark.parametrize("name", STATISTICS)
def test_a_table_of_datasets_has_the_columns_of_the_paper(name: str) -> None:
    assert set(STATISTICS[name]) <= set(read_recipe(name).document["columns"])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a warehouse with the demo and its features, which all recipes share."""
    warehouse = Warehouse(tmp_path_factory.mktemp("recipes") / "warehouse")
    prepare_dataset(warehouse, PrepareOptions(dataset="demo"), notify=lambda text: None)
    extract.run_extract(warehouse, "demo", ExtractOptions(image="hashed", text="hashed"))
    return warehouse.root


@pytest.mark.heavy
@pytest.mark.usefixtures("_wide")
@pytest.mark.parametrize("name", recipe_names())
def test_a_quick_recipe_runs_to_its_end(name: str, demo: Path, tmp_path: Path) -> None:
    where = ("--warehouse", str(demo), "--out", str(tmp_path / "result.parquet"))
    attributes = ("--set", "attributes=title") if name == "mmsrec/table-3" else ()
    printed = run("grid", name, "--dataset", "demo", "--quick", *attributes, *where)
    if name in STATISTICS:
        header = re.split(r"\s{2,}", printed.stdout.splitlines()[1].strip())
        assert [column for column in header if column in STATISTICS[name]] == [*STATISTICS[name]]
        return
    assert "failed" not in printed.stderr
    check_printed(printed.stdout, PAPER_TABLES[name])
