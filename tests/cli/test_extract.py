"""The output of ``mmrec extract``: tables, progress and errors."""

import io
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cli import console
from cli.app import app
from cli.extract import show_extracted
from features.warehouse import Warehouse
from pipeline.extraction.reports import ExtractReport, ModalityReport
from tests.cli.invoke import run
from tests.pipeline.backbones.tiny import prepare

runner = CliRunner()


def test_a_dry_run_does_not_prepare(tmp_path: Path) -> None:
    root = tmp_path / "warehouse"
    words = ["extract", "--dataset", "demo", "--dry-run", "--warehouse", str(root)]
    result = runner.invoke(app, words)
    assert result.exit_code == 2
    assert "run: mmrec prepare --dataset demo" in result.stderr
    assert not root.exists()


@pytest.mark.parametrize("width", [80, 200])
def test_the_closing_table_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(console, "out", Console(file=shown, width=width, soft_wrap=True))
    row = ModalityReport(
        modality="image", backbone="clip-vit-b-32", level="tokens", dim=768, items=1_000_000,
        encoded=900_000, shared=50_000, reused=25_000, absent=15_000, failed={"truncated": 10_000},
        partial=0, seconds=1000.0, rate=900.0, bytes=69_120_000_000, path="",
    )  # fmt: skip
    show_extracted(ExtractReport(dataset="large", tables=(row,)))
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) == (2 if width == 200 else 12)
    for word in ("1,000,000", "900,000", "25,000", "15,000", "10,000", "900.0", "69120.0"):
        assert any(word in line for line in lines)


def test_a_dataset_without_a_usable_input_is_not_called_finished(
    warehouse: Warehouse, tmp_path: Path
) -> None:
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(b"no image")
    prepare(warehouse, tmp_path, ids=["a", "b"], text=["x", "y"], image=["0.png", "1.png"])
    base = ("extract", "--dataset", "tiny", "--warehouse", str(warehouse.root))
    result = run(*base, "--image", "hashed", "--text", "hashed", code=2)
    assert "error: no input of image could be used" in result.stderr
    run(*base, "--text", "hashed")
