"""``mmrec recommend``: what it prints, writes and refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from features.warehouse import Warehouse
from tests.cli.invoke import run
from tests.trainer import worlds
from tests.trainer.runs.test_recommend import begin


def test_lists_files_and_mistakes(warehouse: Warehouse, tmp_path: Path) -> None:
    worlds.prepare(warehouse, [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9, 10, 11, 0, 1]], 12)
    begin(warehouse, "sasrec", "r")
    base = ("recommend", "--warehouse", str(warehouse.root))
    result = run(*base, "--user", "u1", "--k", "3", "--json")
    document = json.loads(result.stdout)
    assert (document["run"], document["user"], document["last"]) == ("r", "u1", "i6")
    assert [entry["rank"] for entry in document["items"]] == [1, 2, 3]
    assert not {entry["item_id"] for entry in document["items"]} & {"i4", "i5", "i6"}
    assert "from a history of 3 items, the last one i6" in result.stderr
    same = json.loads(
        run(*base, "--history", "i4, i5", "--history", "i6", "--k", "3", "--json").stdout
    )
    assert same["items"] == document["items"]
    everything = run(*base, "--user", "u1", "--k", "50", "--keep-seen", "--index", "torch")
    assert len(everything.stdout.splitlines()) == 1 + 12
    assert "no more than these 12 items" in everything.stderr
    near = run(*base, "--similar", "i3", "--k", "2").stdout.splitlines()
    assert near[0].split() == ["rank", "item_id", "text", "cosine", "cold"]
    assert "i3" not in near[1].split()

    out = tmp_path / "all.parquet"
    written = json.loads(run(*base, "--all", "--out", str(out), "--k", "4", "--json").stdout)
    assert written["rows"] == len(pq.read_table(out)) == 3 * 4
    rows = pq.read_table(out).to_pylist()
    run(*base, "--all", "--out", str(out.with_suffix(".csv")), "--k", "4")
    assert pa_csv.read_csv(out.with_suffix(".csv"))["item_id"].to_pylist() == [
        row["item_id"] for row in rows
    ]
    run(*base, "--all", "--out", str(out.with_suffix(".jsonl")), "--k", "4")
    lines = out.with_suffix(".jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows

    for arguments, message in (
        ([], "give one of --user"),
        (["--user", "u1", "--similar", "i1"], "give one of --user"),
        (["--all"], "--all and --out FILE go together"),
        (["--user", "u1", "--out", "x"], "--all and --out FILE go together"),
        (["--user", "x"], "has no user 'x'"),
        (["--history", "i1,x"], "has no item 'x'"),
        (["--history", ","], "--history names no item"),
        (["--similar", "x"], "has no item 'x'"),
        (["--user", "u1", "--k", "0"], "--k 0 "),
        (["--user", "u1", "--unmasked"], "--keep-seen"),
        (["--user", "u1", "--index", "x"], "unknown index 'x'"),
        (["--user", "u1", "--run", "x"], "unknown run 'x'"),
    ):
        line = run(*base, *arguments, code=2).stderr.splitlines()[-1]
        assert line.startswith("error: ")
        assert message in line


def test_short_commands_do_not_import_pandas(warehouse: Warehouse) -> None:
    """pyarrow imports an installed pandas at its first conversion, which takes 0.3 CPU s."""
    worlds.prepare(warehouse, [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9, 10, 11, 0, 1]], 12)
    begin(warehouse, "sasrec", "r")
    code = (
        "import sys; from cli.app import app\n"
        "for words in (['datasets'], ['sql', 'FROM runs'], ['recommend', '--user', 'u1']):\n"
        "    try: app([*words, '--warehouse', sys.argv[1]])\n"
        "    except SystemExit as end: assert not end.code, words\n"
        "    if 'pandas' in sys.modules: sys.exit(f'{words} imports pandas')\n"
    )
    words = [sys.executable, "-c", code, str(warehouse.root)]
    done = subprocess.run(
        words, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["x.txt", "x", "x.parquet.gz"])
def test_another_ending_of_out_is_refused_before_any_work(tmp_path: Path, name: str) -> None:
    for command in (("recommend", "--all"), ("grid", "none.toml")):
        result = run(*command, "--out", str(tmp_path / name), code=2)
        assert ".csv" in result.stderr
        assert not list(tmp_path.iterdir())
