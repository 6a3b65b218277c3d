"""Comparisons against metrics and tests worked out by hand; runs that cannot be compared."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
from safetensors.numpy import save_file

from features.atomic_files import write_table, write_text
from features.errors import UserError
from features.schema import PREDICTIONS_SCHEMA
from features.warehouse import Warehouse
from retrieval.significance import paired_test
from trainer.analysis.compare import compare

RANKS = {"a": [1, 2, 11, 3], "b": [2, 2, 4, 20]}


def write_run(
    warehouse: Warehouse,
    name: str,
    filtered: list[int] | None,
    *,
    about: dict[str, Any] | None = None,
    seed: int = 1,
    items: list[int] | None = None,
    interactions: str = "i",
) -> None:
    """A run with nothing but what a comparison reads; kept ranks are one more."""
    folder = warehouse.runs_dir / name
    run = {"model": "m", "dataset": "d", "features": [], "fingerprint": "f", "created": name}
    document = {"run": {**run, **(about or {})}, "train": {"seed": seed, "lr": 0.1}, "model": {}}
    write_text(folder / "config.toml", tomli_w.dumps(document))
    if filtered is None:
        return
    identity = f'{{"interactions": "{interactions}"}}'
    weights = {"w": np.zeros(1, np.float32)}
    save_file(weights, folder / "model.safetensors", metadata={"mmrec": identity})
    rows = [
        {
            "split": split, "user": user, "user_id": f"u{user}", "item": item, "item_id": "x",
            "history": 3, "cold": user == 2, "rank_filtered": rank, "rank_kept": rank + 1,
        }
        for split, shift in (("validation", 1), ("test", 0))
        for user, (rank, item) in enumerate(
            zip((r + shift for r in filtered), items or [5, 6, 7, 8], strict=True)
        )
    ][::-1]  # fmt: skip
    table = pa.Table.from_pylist(rows, schema=PREDICTIONS_SCHEMA)
    write_table(folder / "predictions.parquet", table)


@pytest.fixture
def evaluated(warehouse: Warehouse) -> Warehouse:
    for name, filtered in RANKS.items():
        write_run(warehouse, name, filtered)
    return warehouse


def test_values_and_differences_by_hand(evaluated: Warehouse) -> None:
    comparison = compare(evaluated, ["a", "b"], metrics=["HR@10", "MRR"])
    assert (comparison.dataset, comparison.split, comparison.users) == ("d", "test", 4)
    assert [system.label for system in comparison.systems] == ["a", "b"]
    values = {(line.seen, line.metric, line.system): line.value for line in comparison.lines}
    assert values == pytest.approx(
        {
            ("filtered", "HR@10", "a"): 3 / 4,
            ("filtered", "HR@10", "b"): 3 / 4,
            ("filtered", "MRR", "a"): (1 + 1 / 2 + 1 / 11 + 1 / 3) / 4,
            ("filtered", "MRR", "b"): (1 / 2 + 1 / 2 + 1 / 4 + 1 / 20) / 4,
            ("kept", "HR@10", "a"): 3 / 4,
            ("kept", "HR@10", "b"): 3 / 4,
            ("kept", "MRR", "a"): (1 / 2 + 1 / 3 + 1 / 12 + 1 / 4) / 4,
            ("kept", "MRR", "b"): (1 / 3 + 1 / 3 + 1 / 5 + 1 / 21) / 4,
        }
    )
    first, second = (
        line for line in comparison.lines if (line.seen, line.metric) == ("filtered", "MRR")
    )
    assert first.test is None
    assert second.test is not None
    # Users 0, 2 and 3 differ by -1/2, +7/44 and -17/60: of the 8 assignments of signs only the one
    # observed and its opposite, and those with +7/44 turned, are as far from zero.
    assert second.test.p_value == 4 / 8
    assert second.test.difference == pytest.approx((-1 / 2 + 7 / 44 - 17 / 60) / 4)
    mine = 1 / np.array(RANKS["b"]) - 1 / np.array(RANKS["a"])
    assert second.test == paired_test(mine, np.zeros(4))


def test_predictions_of_version_0_1_are_compared(evaluated: Warehouse) -> None:
    expected = compare(evaluated, ["a", "b"]).lines
    path = evaluated.runs_dir / "b" / "predictions.parquet"
    table = pq.read_table(path)
    old = {"rank_filtered": "rank_masked", "rank_kept": "rank_unmasked"}
    pq.write_table(table.rename_columns([old.get(n, n) for n in table.column_names]), path)
    assert compare(evaluated, ["a", "b"]).lines == expected


def test_the_other_split_and_cold_targets(evaluated: Warehouse) -> None:
    comparison = compare(evaluated, ["a", "b"], split="validation", targets="cold", metrics=["MRR"])
    assert comparison.users == 1
    assert comparison.lines[0].value == 1 / 12
    assert comparison.lines[1].value == 1 / 5


def test_seeds_stand_as_one_system(evaluated: Warehouse) -> None:
    """Values are of each user's mean over the runs, the deviation is over the runs."""
    write_run(evaluated, "a2", [3, 2, 1, 3], seed=2)
    write_run(evaluated, "c", [1, 1, 1, 1], about={"model": "other"})
    by_model = compare(evaluated, ["c", "a", "a2"], by="model", metrics=["MRR"])
    assert [(s.label, s.runs) for s in by_model.systems] == [
        ("other", ["c"]),
        ("m x2", ["a", "a2"]),
    ]
    line = by_model.lines[1]
    over = [(1 + 1 / 2 + 1 / 11 + 1 / 3) / 4, (1 / 3 + 1 / 2 + 1 + 1 / 3) / 4]
    assert line.value == pytest.approx(np.mean(over))
    assert line.spread == pytest.approx(np.std(over, ddof=1))
    users = np.mean([1 / np.array(RANKS["a"]), 1 / np.array([3, 2, 1, 3])], axis=0)
    assert line.test is not None
    assert line.test.difference == pytest.approx((users - 1).mean())
    settings = compare(evaluated, ["c", "a", "a2"], by="settings", metrics=["MRR"])
    assert [system.label for system in settings.systems] == ["c", "a x2"]


def test_runs_that_cannot_be_compared(evaluated: Warehouse) -> None:
    write_run(evaluated, "new", None)
    write_run(evaluated, "other", RANKS["a"], about={"dataset": "e"})
    write_run(evaluated, "anew", RANKS["a"], about={"fingerprint": "g"})
    write_run(evaluated, "cut", RANKS["a"], interactions="j")
    write_run(evaluated, "pre", None, about={"stage": "pretrain"})
    write_run(evaluated, "users", RANKS["a"], items=[5, 6, 7, 9])
    for names, message in (
        (["a"], "a is one run"),
        (["a", "a"], "'a' .*twice"),
        (["a", "none"], "unknown run 'none'"),
        (["a", "new"], "'new' .*mmrec eval --run new"),
        (["a", "other"], "'other' .*'e'.*'a' .*'d'"),
        (["a", "anew"], r"'d'.*'a' \(items g, not f\)"),
        (["a", "cut"], r"'d'.*'a' \(interactions j, not i\)"),
        (["a", "pre"], "run 'pre' is a pre-training"),
        (["a", "users"], "other users or targets"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            compare(evaluated, names)
        assert "\n" not in str(refused.value)
    for settings, message in (
        ({"split": "train"}, "'train'.*validation, test"),
        ({"targets": "hot"}, "targets 'hot'"),
        ({"metrics": ["AUC"]}, "'AUC'"),
        ({"by": "seed"}, "'seed'.*run, model, settings"),
        ({"by": "model"}, "are one system .* model"),
    ):
        with pytest.raises(UserError, match=message):
            compare(evaluated, ["a", "b"], **settings)


def test_damaged_files_are_one_line(evaluated: Warehouse) -> None:
    path: Path = evaluated.runs_dir / "b" / "predictions.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(UserError, match="mmrec eval --run b"):
        compare(evaluated, ["a", "b"])
    (path.parent / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="is damaged"):
        compare(evaluated, ["a", "b"])
