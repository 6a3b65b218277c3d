"""The code of pipeline/media/README.md runs as it is printed."""

import re
from pathlib import Path

import pytest

from tests.pipeline.backbones.tiny import picture

FOLDER = Path(__file__).parents[3] / "pipeline" / "media"
TEXT = (FOLDER / "README.md").read_text()


def test_the_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "7.png", seed=1, size=(40, 30))
    (code,) = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    exec(compile(code, "README.md", "exec"), {"raw": str(tmp_path)})
    assert capsys.readouterr().out.splitlines() == ["RGB (40, 30)", "read file not found"]


def test_every_file_is_listed() -> None:
    files = {path.name for path in FOLDER.glob("*.py")} - {"__init__.py"}
    table = "\n".join(line for line in TEXT.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`(\w+\.py)`", table)) == files
