"""``mmrec backbones`` on terminals of every width."""

from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cli import console
from cli.app import app
from pipeline.backbones.registry import BACKBONES


@pytest.mark.parametrize("width", [80, 120, 144, 200])
def test_nothing_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    with (tmp_path / "out").open("w") as file:
        printed = Console(file=file, width=width, highlight=False, soft_wrap=True)
        monkeypatch.setattr(console, "out", printed)
        assert CliRunner().invoke(app, ["backbones"]).exit_code == 0
    text = (tmp_path / "out").read_text()
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in text
    tables = 2 if width < 144 else 1
    for name, entry in BACKBONES.items():
        assert sum(line.startswith(f"{name} ") for line in lines) == tables
        for one in entry.checkpoint.split(" + "):
            assert one in text
        assert entry.licence in text
