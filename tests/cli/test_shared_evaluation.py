"""``mmrec eval`` in several processes: one result, that of a single process."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from features.warehouse import Warehouse
from tests.cli.invoke import run
from tests.cli.test_signals import two_processes
from tests.trainer import worlds

SMALL = ("device=cpu", "epochs=1", "dim=8", "heads=2", "hidden=8", "eval_batch=4")
PRIOR = ("--set", "prior=transitions")
PAIRS = [word for pair in SMALL for word in ("--set", pair)]
FILES = ("metrics.parquet", "predictions.parquet")


@pytest.mark.heavy
def test_an_evaluation_of_two_processes_is_that_of_one(warehouse: Warehouse) -> None:
    worlds.prepare(warehouse, [[(u + k) % 17 for k in range(6)] for u in range(30)], 17)
    root = ("--warehouse", str(warehouse.root))
    run("train", "--model", "sasrec", "--name", "s", *PAIRS, *PRIOR, *root)
    alone = run("eval", "s", "--json", *root).stdout
    folder = Path(warehouse.root) / "runs" / "s"
    before = [(folder / name).read_bytes() for name in FILES]
    (folder / FILES[1]).unlink()
    processes = two_processes(("eval", "s", "--json", *root))
    printed = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert json.loads(printed[0][0]) == json.loads(alone)
    assert printed[1] == ("", "")
    assert [(folder / name).read_bytes() for name in FILES] == before


@pytest.mark.parametrize(
    "words", [("--dataset", "world"), ("--protocol", "retrieval"), ("--index", "faiss:hnsw")]
)
def test_an_evaluation_that_is_not_shared_ends_with_one_line(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch, words: tuple[str, str]
) -> None:
    worlds.prepare(warehouse, [[(u + k) % 17 for k in range(6)] for u in range(30)], 17)
    root = ("--warehouse", str(warehouse.root))
    run("train", "--model", "popularity", "--name", "p", "--set", "device=cpu", *root)
    monkeypatch.setattr("trainer.distributed.is_distributed", lambda: True)
    monkeypatch.setattr("trainer.distributed.process_group", nullcontext)
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = run("eval", "p", *words, *root, code=2).stderr
    assert error.splitlines()[-1].startswith("error: ")
    assert "in one process, not in 2; start it without torchrun" in error
