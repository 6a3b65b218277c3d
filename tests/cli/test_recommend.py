"""``mmrec recommend``: what it prints, writes and refuses."""

import json
from pathlib import Path

import pyarrow.parquet as pq
from typer.testing import CliRunner, Result

from cli.app import app
from features.warehouse import Warehouse
from tests.trainer import worlds
from tests.trainer.runs.test_recommend import begin


def run(*words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == code, (words, result.output, result.exception)
    return result


def test_lists_files_and_mistakes(warehouse: Warehouse, tmp_path: Path) -> None:
    worlds.prepare(warehouse, [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9, 10, 11, 0, 1]], 12)
    begin(warehouse, "sasrec", "r")
    ask = ("recommend", "--warehouse", str(warehouse.root))
    told = run(*ask, "--user", "u1", "--k", "3", "--json")
    document = json.loads(told.stdout)
    assert (document["run"], document["user"], document["last"]) == ("r", "u1", "i6")
    assert [one["rank"] for one in document["items"]] == [1, 2, 3]
    assert not {one["item_id"] for one in document["items"]} & {"i4", "i5", "i6"}
    assert "from a history of 3 items, the last one i6" in told.stderr
    same = json.loads(
        run(*ask, "--history", "i4, i5", "--history", "i6", "--k", "3", "--json").stdout
    )
    assert same["items"] == document["items"]
    everything = run(*ask, "--user", "u1", "--k", "50", "--keep-seen", "--index", "torch")
    assert len(everything.stdout.splitlines()) == 1 + 12
    assert "no more than these 12 items" in everything.stderr
    near = run(*ask, "--similar", "i3", "--k", "2").stdout.splitlines()
    assert near[0].split() == ["rank", "item_id", "text", "cosine", "cold"]
    assert "i3" not in near[1].split()

    out = tmp_path / "all.parquet"
    written = json.loads(run(*ask, "--all", "--out", str(out), "--k", "4", "--json").stdout)
    assert written["rows"] == len(pq.read_table(out)) == 3 * 4

    for words, message in (
        ([], "give one of --user"),
        (["--user", "u1", "--similar", "i1"], "give one of --user"),
        (["--all"], "--all and --out FILE.parquet go together"),
        (["--user", "u1", "--out", "x"], "--all and --out FILE.parquet go together"),
        (["--user", "x"], "has no user 'x'"),
        (["--history", "i1,x"], "has no item 'x'"),
        (["--history", ","], "--history names no item"),
        (["--similar", "x"], "has no item 'x'"),
        (["--user", "u1", "--k", "0"], "--k 0 "),
        (["--user", "u1", "--unmasked"], "--keep-seen"),
        (["--user", "u1", "--index", "x"], "unknown index 'x'"),
        (["--user", "u1", "--run", "x"], "unknown run 'x'"),
    ):
        said = run(*ask, *words, code=2).stderr.splitlines()[-1]
        assert said.startswith("error: ")
        assert message in said
