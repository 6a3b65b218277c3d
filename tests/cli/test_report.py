"""``mmrec report``: where it writes, and what it refuses."""

import json
from pathlib import Path

from features.warehouse import Warehouse
from tests.cli.invoke import run
from tests.trainer.analysis.test_curves import write_run


def test_pages_pictures_and_mistakes(warehouse: Warehouse, tmp_path: Path) -> None:
    write_run(warehouse, "a")
    write_run(warehouse, "b")
    base = ("report", "--warehouse", str(warehouse.root))
    last = run(*base)
    assert "run: b (the last one)" in last.stderr
    path = warehouse.runs_dir / "b" / "report.html"
    assert last.stdout.strip() == str(path)
    assert path.read_text().startswith("<!DOCTYPE html>")
    out = str(tmp_path / "both.html")
    document = json.loads(run(*base, "a", "b", "--out", out, "--json").stdout)
    assert document == {"runs": ["a", "b"], "file": out}
    image = tmp_path / "curves.svg"
    labels = ("--label", "w/o PT", "--label", "w. PT")
    run(*base, "a", "b", "--curves", str(image), *labels)
    assert "w/o PT: 0.3000 in epoch 2" in image.read_text()
    for arguments, message in (
        (["none"], "unknown run 'none'"),
        (["a", "a"], "'a' is named twice"),
        (["a", "--curves", "x.gif"], "end it in .png, .svg, .pdf"),
        (["a", "--curves", "x.png", "--out", "y.html"], "leave --out out"),
        (["a", "--curves", "x.png", "--map"], "leave --map out"),
        (["a", "b", "--label", "x"], "1 labels for 2 runs"),
        (["a", "--gallery", "--map"], "leave --map out"),
        (["a", "--gallery", "--curves", "x.png"], "leave --curves out"),
        (["a", "--metric", "AUC"], "unknown metric 'AUC'"),
    ):
        stderr = run(*base, *arguments, code=2).stderr
        assert stderr.startswith("error: ")
        assert message in stderr
        assert stderr.count("\n") == 1
