"""``mmrec tune`` on a world of a few rows: its trials, its end, and what it never looks at."""

import json
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from cli import console
from features import extras
from features.warehouse import Warehouse
from tests.cli.invoke import run
from trainer.runs.folder import stored_metrics
from trainer.runs.spec import RunSpec

pytest.importorskip("optuna", reason="the extra tune is not installed")
ROOT = Path(__file__).parents[2]
SEARCH = """
trials = 4
[runs]
model = "sasrec"
epochs = 2
hidden = 8
heads = 2
length = 5
device = "cpu"
dim = [8, 16]
lr = {low = 1e-4, high = 1e-2, log = true}
layers = {low = 1, high = 2}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "search.toml"
    path.write_text(SEARCH)
    return path


def search(file: Path, root: str, *options: str) -> dict[str, Any]:
    command_line = ("tune", str(file), "--warehouse", root, "--json", *options)
    document: dict[str, Any] = json.loads(run(*command_line).stdout)
    return document


def test_the_best_settings_are_a_file_that_train_takes(root: str, file: Path) -> None:
    document = search(file, root)
    trials = document["trials"]
    assert [trial["number"] for trial in trials] == [0, 1, 2, 3]
    assert {trial["state"] for trial in trials} <= {"finished", "pruned"}
    for trial in trials:
        assert trial["values"]["dim"] in ("8", "16")
        assert 1e-4 <= trial["values"]["lr"] <= 1e-2
        assert trial["values"]["layers"] in (1, 2)
    best = max(trial["value"] for trial in trials)
    assert document["best"]["value"] == best
    assert document["config"] == str(file.with_suffix(".best.toml"))

    words = shlex.split(document["command"])
    assert words[:2] == ["mmrec", "train"]
    run(*words[1:], "--name", "again")
    warehouse = Warehouse(root)
    again = RunSpec.read(warehouse, warehouse.runs_dir / "again")
    trial_run = RunSpec.read(warehouse, warehouse.runs_dir / document["best"]["run"])
    assert again.identity() == trial_run.identity()
    config = tomllib.loads(Path(document["config"]).read_text())
    assert config["model"]["dim"] == int(document["best"]["values"]["dim"])


def test_the_test_split_is_never_looked_at(
    root: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits: list[str] = []
    from features.dataset import Dataset

    eval_split = Dataset.eval_split

    def spy(self: Dataset, split: str, *args: Any, **options: Any) -> Any:
        splits.append(split)
        return eval_split(self, split, *args, **options)

    monkeypatch.setattr(Dataset, "eval_split", spy)
    document = search(file, root, "--trials", "2")
    assert set(splits) == {"validation"}
    runs = Warehouse(root).runs_dir
    for trial in document["trials"]:
        folder = runs / trial["run"]
        rows = stored_metrics(folder / "metrics.parquet")
        assert {row["split"] for row in rows} == {"train", "validation"}
        assert not (folder / "predictions.parquet").exists()
    assert "test" not in json.dumps(document["trials"])


def test_a_search_goes_on_where_it_was_interrupted(
    root: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = console.ProgressLine.update

    def interrupt(self: console.ProgressLine, text: str, **options: Any) -> None:
        update(self, text, **options)
        if re.match(r"trial 1 of 4: epoch 2", text) and not options.get("keep"):
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(console.ProgressLine, "update", interrupt)
        stopped = run("tune", str(file), "--warehouse", root, code=130)
    command = stopped.stderr.splitlines()[-1].partition(" with: mmrec ")[2]
    document = json.loads(run(*shlex.split(command), "--json").stdout)
    trials = document["trials"]
    assert [trial["state"] for trial in trials].count("stopped") == 1
    assert sum(trial["state"] in ("finished", "pruned") for trial in trials) == 4
    stopped_trial, again = trials[1], trials[2]
    assert again["values"] == stopped_trial["values"]
    assert again["run"] == stopped_trial["run"]
    assert again["epochs"] == 2
    assert len(search(file, root)["trials"]) == len(trials)  # nothing is left to do


def test_a_failed_trial_is_a_row(root: str, file: Path) -> None:
    file.write_text(SEARCH.replace("dim = [8, 16]", "dim = [9, 8]"))  # 9 is no multiple of heads
    document = search(file, root, "--trials", "6")
    states = {trial["values"]["dim"]: trial["state"] for trial in document["trials"]}
    assert states["9"] == "failed"
    assert states["8"] in ("finished", "pruned")
    failed = next(trial for trial in document["trials"] if trial["state"] == "failed")
    assert "heads=2" in failed["message"]
    assert document["best"]["values"]["dim"] == "8"


def test_a_search_without_a_finished_trial_ends_with_an_error(root: str, file: Path) -> None:
    file.write_text(SEARCH.replace("dim = [8, 16]", "dim = [9, 11]"))
    printed = run("tune", str(file), "--warehouse", root, code=2)
    assert printed.stderr.count("multiple of heads") == 4
    assert not file.with_suffix(".best.toml").exists()


def test_trials_below_the_median_are_pruned_and_their_runs_deleted(
    root: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.runs import tune as runs_tune

    monkeypatch.setattr(runs_tune, "_STARTUP_TRIALS", 1)
    monkeypatch.setattr(runs_tune, "_WARMUP_EPOCHS", 0)
    text = SEARCH.replace(
        "lr = {low = 1e-4, high = 1e-2, log = true}", "lr = {low = 1e-9, high = 1}"
    )
    file.write_text(text.replace("epochs = 2", "epochs = 4"))
    document = search(file, root, "--trials", "10")
    pruned = [trial for trial in document["trials"] if trial["state"] == "pruned"]
    assert pruned
    assert all(trial["epochs"] < 4 and trial["value"] is None for trial in pruned)
    runs = Warehouse(root).runs()
    assert not {trial["run"] for trial in pruned} & set(runs)
    assert document["best"]["run"] in runs


@pytest.mark.heavy
@pytest.mark.slow
def test_several_processes_share_a_search(root: str, file: Path) -> None:
    words = [sys.executable, "-m", "cli.app", "tune", str(file), "--warehouse", root, "--json"]
    processes = [
        subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    trials = search(file, root)["trials"]
    assert [trial["state"] in ("finished", "pruned") for trial in trials] == [True] * 4
    assert len({json.dumps(trial["values"]) for trial in trials}) == 4


def test_the_trial_of_a_killed_process_is_done_again(root: str, file: Path) -> None:
    from trainer.runs.tune import Tuner
    from trainer.runs.tune_file import read_search

    with Tuner(Warehouse(root), read_search(file), file.stem) as tuner:
        drawn = tuner._study.ask(tuner._distributions)  # as a process that is killed at once
    document = search(file, root)
    first, second = document["trials"][:2]
    assert (first["state"], first["values"]) == ("stopped", drawn.params)
    assert second["values"] == drawn.params
    assert sum(trial["state"] in ("finished", "pruned") for trial in document["trials"]) == 4


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("layers =", "layerz =", "layers"),
        ("hidden = 8", "hiden = 8", "hidden"),
        ("low = 1, high = 2", "low = 1.5, high = 2", "layers"),
        ("lr = {low", "activation = {low", "activation"),
        ('"sasrec"', '"sasrek"', "sasrec"),
    ],
)
def test_a_search_that_cannot_run_is_refused_before_the_first_trial(
    root: str, file: Path, old: str, new: str, named: str
) -> None:
    file.write_text(SEARCH.replace(old, new))
    printed = run("tune", str(file), "--warehouse", root, code=2).stderr
    assert named in printed
    assert len(printed.splitlines()) <= 2
    assert Warehouse(root).runs() == []


def test_another_space_needs_another_name(root: str, file: Path) -> None:
    search(file, root, "--trials", "1")
    file.write_text(SEARCH.replace("high = 2}", "high = 3}"))
    assert "--name" in run("tune", str(file), "--warehouse", root, code=2).stderr
    assert search(file, root, "--trials", "1", "--name", "other")["best"]["run"] in (
        Warehouse(root).runs()
    )


def test_no_other_trial_starts_after_the_timeout(root: str, file: Path) -> None:
    assert len(search(file, root, "--timeout", "1e-9")["trials"]) == 1


def test_an_absent_extra_is_one_line(
    root: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda module: None)
    printed = run("tune", str(file), "--warehouse", root, code=2).stderr
    assert "pip install 'mmrec[tune]'" in printed
    assert len(printed.splitlines()) == 1
