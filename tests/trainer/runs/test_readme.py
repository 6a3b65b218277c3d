"""trainer/runs/README.md lists every file, its models are known, and its grids are valid."""

import re
from pathlib import Path

import pytest

from trainer.models.registry import MODELS
from trainer.runs.grid_file import read_grid

FOLDER = Path(__file__).parents[3] / "trainer" / "runs"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
GRIDS = re.findall(r"^```toml\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_every_file_is_listed() -> None:
    table = README.partition("\n## ")[0]
    assert set(re.findall(r"`(\w+\.py)`", table)) == {p.name for p in FOLDER.glob("[!_]*.py")}


def test_the_listed_models_are_known() -> None:
    section = README.partition("## Train\n")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert listed
    assert set(listed) <= set(MODELS)


@pytest.mark.parametrize(("text", "combinations"), list(zip(GRIDS, (27, 18), strict=True)))
def test_a_grid_is_valid(tmp_path: Path, text: str, combinations: int) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(text, encoding="utf-8")
    assert len(read_grid(path).combinations) == combinations
