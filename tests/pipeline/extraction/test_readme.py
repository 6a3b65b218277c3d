"""The commands and the code of pipeline/extraction/README.md run as they are printed."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.app import app

FOLDER = Path(__file__).parents[3] / "pipeline" / "extraction"
TEXT = (FOLDER / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_the_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MMREC_WAREHOUSE", str(tmp_path))
    (commands,) = blocks("")
    for line in commands.splitlines():
        program, *words = shlex.split(line)
        assert program == "mmrec"
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (line, result.output)
    assert result.stdout.count("image") == result.stdout.count("text") == 2
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), {"root": tmp_path})
    words = capsys.readouterr().out.split()
    assert words[0::4] == ["image", "text"]
    assert words[1::4] == ["0", "0"]  # the commands have encoded everything


def test_every_file_is_listed() -> None:
    files = {path.name for path in FOLDER.glob("*.py")} - {"__init__.py"}
    table = "\n".join(line for line in TEXT.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`(\w+\.py)`", table)) == files


def test_the_way_of_an_image_has_at_most_ten_steps() -> None:
    steps = re.findall(r"^(\d+)\. ", TEXT, re.MULTILINE)
    assert [int(step) for step in steps] == list(range(1, len(steps) + 1))
    assert len(steps) <= 10
