"""``mmrec report``: where it writes, and what it refuses."""

import json
from pathlib import Path

from typer.testing import CliRunner, Result

from cli.app import app
from features.warehouse import Warehouse
from tests.trainer.analysis.test_curves import write_run


def run(*words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == code, (words, result.output, result.exception)
    return result


def test_pages_pictures_and_mistakes(warehouse: Warehouse, tmp_path: Path) -> None:
    write_run(warehouse, "a")
    write_run(warehouse, "b")
    ask = ("report", "--warehouse", str(warehouse.root))
    last = run(*ask)
    assert "run: b (the last one)" in last.stderr
    path = warehouse.runs_dir / "b" / "report.html"
    assert last.stdout.strip() == str(path)
    assert path.read_text().startswith("<!DOCTYPE html>")
    out = str(tmp_path / "both.html")
    document = json.loads(run(*ask, "a", "b", "--out", out, "--json").stdout)
    assert document == {"runs": ["a", "b"], "file": out}
    picture = tmp_path / "curves.svg"
    labels = ("--label", "w/o PT", "--label", "w. PT")
    run(*ask, "a", "b", "--curves", str(picture), *labels)
    assert "w/o PT: 0.3000 in epoch 2" in picture.read_text()
    for words, message in (
        (["none"], "unknown run 'none'"),
        (["a", "a"], "'a' is named twice"),
        (["a", "--curves", "x.gif"], "end it in .png, .svg, .pdf"),
        (["a", "--curves", "x.png", "--out", "y.html"], "leave --out out"),
        (["a", "b", "--label", "x"], "1 labels for 2 runs"),
        (["a", "--metric", "AUC"], "unknown metric 'AUC'"),
    ):
        said = run(*ask, *words, code=2).stderr
        assert said.startswith("error: ")
        assert message in said
        assert said.count("\n") == 1
