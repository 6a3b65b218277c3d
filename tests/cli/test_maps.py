"""``mmrec map``: where it writes, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from features.warehouse import Warehouse
from tests.cli.invoke import run
from tests.trainer import worlds
from trainer.runs.train import train_run

pytest.importorskip("sklearn", reason="the extra map is not installed")

SEQUENCES = [[(user + step * step) % 17 for step in range(6)] for user in range(40)]


def test_images_pages_and_mistakes(warehouse: Warehouse, tmp_path: Path) -> None:
    worlds.prepare(warehouse, SEQUENCES, 17)
    settings = ["device=cpu", "epochs=1", "dim=8", "heads=2", "hidden=8", "length=5"]
    for name in ("a", "b"):
        train_run(worlds.begin(warehouse, "sasrec", settings=settings, name=name))
    train_run(worlds.begin(warehouse, "popularity", settings=["device=cpu"], name="counts"))
    base = ("map", "--warehouse", str(warehouse.root))
    image = warehouse.runs_dir / "a" / "map.png"
    assert run(*base, "a").stdout.strip() == str(image)
    with Image.open(image) as opened:
        width, height = opened.size
    assert height > 1.9 * width
    out = tmp_path / "both.png"
    document = json.loads(
        run(*base, "a", "b", "--out", str(out), "--items", "9", "--users", "3", "--json").stdout
    )
    assert document["file"] == str(out)
    assert [entry["run"] for entry in document["maps"]] == ["a", "b"]
    assert [sum(entry["items"].values()) for entry in document["maps"]] == [9, 9]
    assert [(entry["users"], entry["states"]) for entry in document["maps"]] == [(3, 15)] * 2
    with Image.open(out) as opened:
        assert np.asarray(opened.convert("L")).std() > 1
    page = tmp_path / "page.html"
    run("report", "--warehouse", str(warehouse.root), "a", "b", "--map", "--out", str(page))
    assert "data:image/png;base64," in page.read_text()
    for arguments, message in (
        (["counts"], "popularity learns no item vectors"),
        (["none"], "unknown run 'none'"),
        (["a", "b", "counts"], "give at most 2"),
        (["a", "--out", "x.gif"], "end it in .png, .svg, .pdf"),
        (["a", "--items", "2"], "--items 2 is too small"),
        (["a", "--users", "0"], "--users 0 is too small"),
        (["a", "--label", "x", "--label", "y"], "2 labels for 1 runs"),
    ):
        stderr = run(*base, *arguments, code=2).stderr
        assert stderr.startswith("error: ")
        assert message in stderr
        assert stderr.count("\n") == 1
