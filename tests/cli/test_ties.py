"""The order of ties in time, from mmrec prepare to the tables of an evaluation."""

import json
from pathlib import Path

import pytest

from features.warehouse import Warehouse
from tests.cli.invoke import run

FACT = "ties in time: 50.0% of interactions, ordered by"


def prepare(warehouse: Warehouse, tmp_path: Path, ties: str | None, *, tied: bool = True) -> str:
    """Prepare 12 users with 8 items at 4 times, or at 8 times; return what is printed."""
    raw = tmp_path / "raw"
    raw.mkdir(exist_ok=True)
    rows = [
        f"u{user},i{(user * 5 + n * 7) % 20},{n // 2 if tied else n}"
        for user in range(12)
        for n in range(8)
    ]
    (raw / "interactions.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    (raw / "items.csv").write_text("item_id\n" + "".join(f"i{item}\n" for item in range(20)))
    options = ["--ties", ties] if ties else []
    return run(
        "prepare", "--dataset", "mine", "--format", "table", "--raw", str(raw), *options,
        "--warehouse", str(warehouse.root),
    ).output  # fmt: skip


def train(name: str, *root: str) -> None:
    """Train a small model for one epoch."""
    sizes = [word for pair in ("dim=8", "hidden=16", "epochs=1") for word in ("--set", pair)]
    run("train", "--model", "sasrec", "--name", name, *sizes, *root)


@pytest.mark.parametrize("ties", [None, "hash"])
def test_every_table_has_the_share_and_the_order(
    warehouse: Warehouse, tmp_path: Path, ties: str | None
) -> None:
    order = ties or "file"
    assert f"ordered by {order}" in prepare(warehouse, tmp_path, ties)
    root = ("--warehouse", str(warehouse.root))
    for name in ("a", "b"):
        train(name, *root)
        assert f"{FACT} {order}" in run("eval", "--run", name, *root).stdout
    assert f"{FACT} {order}" in run("compare", "a", "b", *root).stdout
    page = tmp_path / "page.html"
    run("report", "a", "--out", str(page), *root)
    assert f"{FACT} {order}" in page.read_text()
    grid = tmp_path / "grid.toml"
    grid.write_text('rows = ["model"]\n[runs]\nmodel = ["popularity"]\n')
    assert f"{FACT} {order}" in run("grid", str(grid), *root).stdout


def test_no_line_without_ties(warehouse: Warehouse, tmp_path: Path) -> None:
    assert "--ties" not in prepare(warehouse, tmp_path, None, tied=False)
    root = ("--warehouse", str(warehouse.root))
    for name in ("a", "b"):
        train(name, *root)
        assert "ties in time" not in run("eval", "--run", name, *root).stdout
    assert "ties in time" not in run("compare", "a", "b", *root).stdout


def test_a_run_on_another_order_is_refused(warehouse: Warehouse, tmp_path: Path) -> None:
    root = ("--warehouse", str(warehouse.root))
    for name, ties in (("a", "id"), ("b", "id-desc")):
        prepare(warehouse, tmp_path, ties)
        train(name, *root)
        run("eval", "--run", name, *root)
    for arguments in (("eval", "--run", "a"), ("train", "--resume", "--run", "a")):
        output = run(*arguments, *root, code=2).output
        assert "another preparation of 'mine' (ties ordered by id, now by id-desc)" in output
    line = run("compare", "a", "b", *root, code=2).output
    assert "ties ordered by id-desc, not by id" in line
    page = tmp_path / "page.html"
    run("report", "a", "--out", str(page), *root)
    assert f"mine as it was: {FACT} id." in page.read_text()
    prepare(warehouse, tmp_path, "id")
    run("eval", "--run", "a", *root)


def test_another_order_of_the_same_sequences_is_no_other_data(
    warehouse: Warehouse, tmp_path: Path
) -> None:
    root = ("--warehouse", str(warehouse.root))
    prepare(warehouse, tmp_path, "id", tied=False)
    train("a", *root)
    prepare(warehouse, tmp_path, "hash", tied=False)
    run("eval", "--run", "a", *root)


def test_the_document_has_the_facts(warehouse: Warehouse, tmp_path: Path) -> None:
    prepare(warehouse, tmp_path, None)
    result = run(
        "prepare", "--dataset", "mine", "--format", "table", "--raw", str(tmp_path / "raw"),
        "--ties", "id", "--json", "--warehouse", str(warehouse.root),
    )  # fmt: skip
    document = json.loads(result.stdout)
    assert (document["ties"], document["tied"]) == ("id", 0.5)
    assert 0 < document["tied_ascending"] < 1
