"""``mmrec export``, and ``mmrec recommend --export`` without a warehouse."""

import importlib.util
import json
from pathlib import Path

import pytest

from features.warehouse import Warehouse
from tests.cli.invoke import run
from tests.trainer import worlds
from tests.trainer.runs.test_recommend import begin

HISTORY = ("--history", "i4,i5", "--history", "i6")


def prepare(warehouse: Warehouse) -> None:
    worlds.prepare(warehouse, [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9, 10, 11, 0, 1]], 12)


def test_an_export_recommends_without_a_warehouse(
    warehouse: Warehouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("onnxruntime", "onnxscript"):
        pytest.importorskip(module, reason="the extra export is not installed")
    prepare(warehouse)
    begin(warehouse, "sasrec", "r")
    place, out = ("--warehouse", str(warehouse.root)), str(tmp_path / "out")
    report = json.loads(run("export", "r", "--out", out, *place, "--json").stdout)
    assert (report["run"], report["items"], report["listed"], report["dim"]) == ("r", 12, 12, 8)
    wanted = json.loads(run("recommend", "r", *HISTORY, *place, "--json").stdout)
    monkeypatch.chdir(tmp_path)
    base = ("recommend", "--export", out)
    document = json.loads(run(*base, *HISTORY, "--json").stdout)
    names = [[entry.pop("score") for entry in items["items"]] for items in (document, wanted)]
    assert names[0] == pytest.approx(names[1], abs=1e-4)
    assert document == wanted
    lines = run(*base, *HISTORY, "--k", "20", "--keep-seen", "--index", "torch")
    assert len(lines.stdout.splitlines()) == 1 + 12
    (tmp_path / "only.txt").write_text("i1\ni2\n")
    some = json.loads(run(*base, *HISTORY, "--only", "only.txt", "--json").stdout)
    assert {entry["item_id"] for entry in some["items"]} == {"i1", "i2"}
    for mistake, part in (
        (("--user", "u1"), "--history"),
        ((*HISTORY, "--dataset", "world"), "--dataset"),
        ((*HISTORY, "--run", "r"), "--run"),
        (("--history", "nothing"), "nothing"),
    ):
        result = run(*base, *mistake, code=2)
        assert part in result.stderr
        assert len(result.stderr.splitlines()) == 1
    (tmp_path / "out" / "sequence_encoder.onnx").write_bytes(b"damaged")
    assert "mmrec export" in run(*base, *HISTORY, code=2).stderr
    (tmp_path / "out" / "manifest.json").unlink()
    assert "mmrec export" in run(*base, *HISTORY, code=2).stderr


@pytest.mark.parametrize("module", ["onnx", "onnxruntime", "onnxscript"])
def test_an_absent_extra_is_named(
    warehouse: Warehouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    prepare(warehouse)
    begin(warehouse, "sasrec", "r")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "trainer.runs.export.find_spec", lambda name: None if name == module else find(name)
    )
    out = ("--out", str(tmp_path / "out"), "--warehouse", str(warehouse.root))
    for command in (("export", "r", *out), ("recommend", "--export", str(tmp_path), *HISTORY)):
        result = run(*command, code=2)
        assert module in result.stderr
        assert "mmrec[export]" in result.stderr
        assert len(result.stderr.splitlines()) == 1
