"""``mmrec runs`` and the names of runs in other commands."""

import json
import re
from pathlib import Path

from features.atomic_files import lock
from features.warehouse import Warehouse
from tests.cli.invoke import run

SMALL = ("--set", "dim=8", "--set", "epochs=1", "--set", "device=cpu")


def test_runs_are_listed_with_what_they_changed(root: str) -> None:
    run("train", "--model", "sasrec", "--name", "a", *SMALL, "--warehouse", root)
    run("train", "--model", "popularity", "--name", "b", "--warehouse", root)
    run("eval", "a", "--warehouse", root)
    first, second = json.loads(run("runs", "--json", "--warehouse", root).stdout)
    assert (first["run"], first["model"], first["dataset"]) == ("a", "sasrec", "world")
    assert set(first["settings"].split(", ")) == {"dim=8", "epochs=1", "device=cpu"}
    assert first["MB"] > second["MB"] > 0
    assert 0 <= first["NDCG@10"] <= 1
    assert second["NDCG@10"] is None
    assert second["settings"] == ""
    printed = run("runs", "--warehouse", root).stdout
    assert "sasrec" in printed
    assert "dim=8" in printed
    statement = "SELECT settings FROM runs WHERE run = 'b'"
    assert json.loads(run("sql", statement, "--json", "--warehouse", root).stdout) == [
        {"settings": ""}
    ]


def test_runs_are_deleted_all_or_none(root: str) -> None:
    for name in "abc":
        run("train", "--model", "popularity", "--name", name, "--warehouse", root)
    assert "d" in run("runs", "--delete", "a", "--delete", "d", "--warehouse", root, code=2).stderr
    with lock(Warehouse(root).runs_dir / "b" / ".lock", "run b"):
        run("runs", "--delete", "a", "--delete", "b", "--warehouse", root, code=2)
    assert Warehouse(root).runs() == ["a", "b", "c"]
    run("runs", "--delete", "a", "--delete", "c", "--warehouse", root)
    assert Warehouse(root).runs() == ["b"]


def test_no_runs(root: str) -> None:
    assert json.loads(run("runs", "--json", "--warehouse", root).stdout) == []
    assert "train" in run("runs", "--warehouse", root).stderr


def test_a_run_is_an_argument_or_an_option(root: str) -> None:
    for name in "ab":
        run("train", "--model", "popularity", "--name", name, "--warehouse", root)
    given = [("a",), ("--run", "a"), ("a", "--run", "a")]
    lists = [
        run("recommend", *words, "--user", "u0", "--warehouse", root).stdout for words in given
    ]
    assert len(set(lists)) == 1
    words = ("recommend", "a", "--run", "b", "--user", "u0", "--warehouse", root)
    assert "two runs" in run(*words, code=2).stderr


def test_the_version() -> None:
    assert re.fullmatch(r"mmrec \d+\.\d+\.\d+\S*\n", run("--version").stdout)


def test_an_unfinished_table_is_mentioned_where_it_is_read(root: str) -> None:
    (manifest,) = Path(root).glob("world/features/toy/image/pooled.json")
    manifest.unlink()
    assert "unfinished" in run("sql", "SELECT * FROM features", "--warehouse", root).stderr
    assert run("sql", "SELECT * FROM items", "--warehouse", root).stderr == ""
