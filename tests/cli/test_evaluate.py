"""``mmrec eval`` on a world of a few rows: what it prints of a sample of users."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from features.warehouse import Warehouse
from tests.cli.invoke import run
from tests.trainer import worlds


@pytest.fixture
def small(warehouse: Warehouse) -> str:
    """Return the path of a warehouse with 30 users and a run of popularity."""
    worlds.prepare(warehouse, [[(u + k) % 17 for k in range(6)] for u in range(30)], 17)
    root = str(warehouse.root)
    run("train", "--model", "popularity", "--name", "p", "--set", "device=cpu",
        "--warehouse", root)  # fmt: skip
    return root


@pytest.mark.parametrize(("users", "shown"), [(7, "sample of 7 users"), (30, ""), (1000, "")])
def test_a_sample_of_users_is_named_and_not_stored(small: str, users: int, shown: str) -> None:
    command = ("eval", "--run", "p", "--users", str(users), "--seed", "3", "--warehouse", small)
    folder = Path(small) / "runs" / "p"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    printed = run(*command).stdout
    assert shown in printed
    title = next(line for line in printed.splitlines() if line.startswith("test: "))
    assert title.startswith(f"test: {shown or '30 users'}")
    assert "not stored" in printed
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    document = json.loads(run(*command, "--json").stdout)
    assert {row["split"] for row in document["rows"]} == {"test"}
    assert (document["sample"] is None) == (not shown)


@pytest.mark.parametrize("index", ["faiss:ivf,nprobe=1", "faiss:ivfpq", "faiss:hnsw"])
def test_results_of_an_approximate_index_show_its_recall_and_are_not_stored(
    small: str, index: str
) -> None:
    run("train", "--model", "sasrec", "--name", "s", "--set", "device=cpu", "--set", "epochs=1",
        "--set", "dim=8", "--set", "heads=2", "--warehouse", small)  # fmt: skip
    folder = Path(small) / "runs" / "s"
    command = ("eval", "s", "--index", index, "--warehouse", small)
    run("eval", "s", "--warehouse", small)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    printed = run(*command).stdout
    assert "recall@10" in printed
    assert "not stored" in printed
    document = json.loads(run(*command, "--json").stdout)
    assert document["index"] == index
    assert 0 < document["search"]["recall"]["recall@10"] <= 1
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert len(list((folder / "indexes").iterdir())) == 1
    words = ("recommend", "s", "--user", "u1", "--index", index, "--json", "--warehouse", small)
    again = run(*words)
    assert json.loads(again.stdout)["recall"].keys() == {"recall@10"}
    assert "training the index" not in again.stderr
    (saved,) = (folder / "indexes").iterdir()
    saved.unlink()
    assert "training the index" in run(*words).stderr


def test_an_evaluation_on_a_later_preparation_is_marked(
    warehouse: Warehouse, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the users have two more interactions, and there is one item more."""
    monkeypatch.setattr(
        "trainer.runs.evaluation_rows.bootstrap",
        lambda matrix, groups: (matrix.min(0), matrix.max(0)),
    )
    sequences = [[(u + k) % 17 for k in range(6 + 2 * (u % 2))] for u in range(30)]
    worlds.prepare(warehouse, [*sequences, [0, 1, 2, 17]], 18, [f"i{item}" for item in range(18)])
    strict = ("eval", "p", "--warehouse", small)
    error = run(*strict, code=2).output
    assert "mmrec eval --run p --dataset world" in " ".join(error.split())
    printed = run(*strict, "--dataset", "world").stdout
    titles = [line for line in printed.splitlines() if line.startswith(("test", "validation"))]
    assert all(", later preparation" in title for title in titles)
    assert [title.split(":")[0].split(", ")[-1] for title in titles] == [
        *("later preparation", "known-item targets only"),
        *("later preparation", "new-item targets only", "known-item targets only"),
    ]
    text = " ".join(printed.split())
    assert "trained on (validation 0, test 0)" in text
    assert "chooses the epoch (validation 15, test 0)" in text
    document = json.loads(run(*strict, "--dataset", "world", "--json").stdout)
    assert document["later"]["kind"] == "later preparation"
    assert document["later"]["new_items"] == 1
    assert {row["phase"] for row in document["rows"]} == {"later"}


def test_a_grid_evaluates_results_of_an_earlier_protocol_again(
    warehouse: Warehouse, tmp_path: Path
) -> None:
    """The last item of every third user repeats the first one."""
    worlds.prepare(
        warehouse,
        [[(u + k) % 17 for k in range(5)] + [u % 17 if u % 3 == 0 else (u + 6) % 17]
         for u in range(30)],
        17,
    )  # fmt: skip
    root = str(warehouse.root)
    file = tmp_path / "table.toml"
    file.write_text('rows = ["model"]\n[runs]\nmodel = ["popularity"]\ndevice = "cpu"\n')
    command = ("grid", str(file), "--warehouse", root)
    assert "33.33% of the test targets are repeated" in run(*command).stdout
    assert "reused" in run(*command).stderr
    (predictions,) = (warehouse.root / "runs").glob("*/predictions.parquet")
    table = pq.read_table(predictions)
    pq.write_table(table.replace_schema_metadata(None), predictions)
    again = run(*command)
    assert "33.33% of the test targets are repeated" in again.stdout
    assert pq.read_schema(predictions).metadata[b"protocol"] == b"2"
