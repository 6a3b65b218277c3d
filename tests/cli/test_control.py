"""``--control`` of ``mmrec train`` and ``mmrec compare``, and the mark of a control everywhere."""

import json
import shlex
from pathlib import Path

from tests.cli.invoke import run

SMALL = [
    word
    for pair in ("dim=8", "heads=2", "hidden=16", "epochs=1", "device=cpu")
    for word in ("--set", pair)
]
MARK = "mmsrec (control: permute)"


def test_a_control_is_trained_found_and_marked(root: str, tmp_path: Path) -> None:
    place = ("--warehouse", root)
    run("train", "--model", "mmsrec", "--name", "real", *SMALL, *place)
    run("eval", "real", *place)
    error = run("compare", "real", "--control", *place, code=2).stderr
    assert error.count("\n") == 1
    training, evaluation = error.partition("run: ")[2].strip().split(" && ")
    assert shlex.split(training)[-2:] == [*place]
    trained = run(*shlex.split(training)[1:])
    assert f"run real-permute: {MARK} on world" in trained.stderr
    assert "control=permute: the rows of each feature table are permuted" in trained.stderr

    printed = run(*shlex.split(evaluation)[1:]).stdout
    assert f"run real-permute: {MARK} on world" in printed
    assert "control=permute: the rows" in printed
    document = json.loads(run("eval", "real-permute", "--json", *place).stdout)
    assert document["control"] == "permute"

    compared = run("compare", "real", "--control", "--metric", "MRR", *place).stdout
    assert "differences to real-permute (control: permute)" in compared
    assert "control=permute: the rows" in compared
    document = json.loads(run("compare", "real", "--control", "--json", *place).stdout)
    assert [system["control"] for system in document["systems"]] == ["permute", "none"]

    assert MARK in run("runs", *place).stdout
    rows = json.loads(run("runs", "--json", *place).stdout)
    assert [row["control"] for row in rows] == ["none", "permute"]
    page = tmp_path / "page.html"
    run("report", "real", "real-permute", "--out", str(page), *place)
    assert "real-permute (control: permute)" in page.read_text("utf-8")
    lists = run("recommend", "real-permute", "--user", "u1", *place)
    assert "control=permute: the rows" in lists.stderr
    refused = run("export", "real-permute", "--out", str(tmp_path / "out"), *place, code=2).stderr
    assert "is a control (control=permute)" in refused


def test_a_grid_has_controls_as_an_axis(root: str, tmp_path: Path) -> None:
    file = tmp_path / "grid.toml"
    file.write_text(
        'rows = ["control"]\nmetrics = ["MRR"]\n[runs]\nmodel = "mmsrec"\n'
        'control = ["none", "permute"]\ndim = 8\nheads = 2\nhidden = 16\nepochs = 1\n'
        'device = "cpu"\n'
    )
    place = ("--warehouse", root)
    assert "(runs control=permute)" in run("grid", str(file), *place).stdout
    document = json.loads(run("grid", str(file), "--json", *place).stdout)
    assert [entry["control"] for entry in document["runs"]] == ["none", "permute"]


def test_a_control_of_ids_alone_is_one_line(root: str) -> None:
    options = ("--control", "permute", "--warehouse", root)
    stderr = run("train", "--model", "sasrec", *options, code=2).stderr
    assert "control=permute changes feature tables, and sasrec reads none" in stderr
    assert stderr.count("\n") == 1 or stderr.startswith("dataset: ")
    stderr = run("train", "--resume", *options, code=2).stderr
    assert "--control out" in stderr
    run("train", "--model", "sasrec", "--name", "ids", *SMALL, "--warehouse", root)
    stderr = run("compare", "ids", "--control", "--warehouse", root, code=2).stderr
    assert "'ids' (sasrec) reads no feature table" in stderr
