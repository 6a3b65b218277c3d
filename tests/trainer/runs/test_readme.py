"""trainer/runs/README.md lists every file, its models are known, and its grids are valid."""

import re
from pathlib import Path

import pytest

from trainer.models.registry import MODELS
from trainer.runs.grid_file import read_grid
from trainer.runs.tune_file import read_search

FOLDER = Path(__file__).parents[3] / "trainer" / "runs"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
FILES = re.findall(r"^```toml\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SEARCHES = [text for text in FILES if text.startswith("trials")]
GRIDS = [text for text in FILES if text not in SEARCHES]


def test_every_file_is_listed() -> None:
    table = README.partition("\n## ")[0]
    assert set(re.findall(r"`(\w+\.py)`", table)) == {p.name for p in FOLDER.glob("[!_]*.py")}


def test_the_listed_models_are_known() -> None:
    table = README.partition("| model | description |\n")[2].partition("\n\n")[0]
    listed = re.findall(r"`(\w+)`", "".join(re.findall(r"^\|(.*?) \|", table, re.MULTILINE)))
    assert set(listed) == set(MODELS)


@pytest.mark.parametrize(("text", "combinations"), list(zip(GRIDS, (27, 18), strict=True)))
def test_a_grid_is_valid(tmp_path: Path, text: str, combinations: int) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(text, encoding="utf-8")
    assert len(read_grid(path).combinations) == combinations


@pytest.mark.parametrize("text", SEARCHES)
def test_a_search_is_valid(tmp_path: Path, text: str) -> None:
    path = tmp_path / "search.toml"
    path.write_text(text, encoding="utf-8")
    assert read_search(path).trials == 50
