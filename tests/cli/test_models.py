"""``mmrec train`` and ``eval`` on a world of a few rows: what they say, and how they end."""

import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli import training_lines
from tests.cli.invoke import run

ROOT = Path(__file__).parents[2]
SMALL = ["dim=8", "heads=2", "hidden=8", "length=5", "epochs=2", "batch_size=16", "device=cpu"]
SETS = [word for setting in SMALL for word in ("--set", setting)]


def test_an_interrupted_training_names_the_command_that_continues_it(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    show = training_lines.TrainWatch.__call__

    def interrupt(self: training_lines.TrainWatch, tick: Any) -> None:
        show(self, tick)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(training_lines.TrainWatch, "__call__", interrupt)
        train = ("train", "--model", "sasrec", "--name", "r", *SETS, "--warehouse", root, "--json")
        stopped = run(*train, code=130)
    assert not json.loads(stopped.stdout)["finished"]
    assert re.search(r"0 epochs in \d+s, none validated yet", stopped.stderr)
    command = stopped.stderr.splitlines()[-1].partition("continue with: ")[2]
    assert command == f"mmrec train --resume --run r --warehouse {shlex.quote(root)}"

    words = shlex.split(command)[1:]
    assert "finished: 2 epochs" in run(*words).stderr
    again = run(*words).stderr.splitlines()[-1]
    assert again.startswith("run r is finished already; nothing was trained, best epoch ")


def test_a_training_on_features_says_what_they_cover(root: str) -> None:
    result = run("train", "--model", "mmsrec", *SETS, "--warehouse", root)
    # of 12 items every fourth lacks a picture, every fourth another a text, and the last one both
    assert "of 12 items: image 8, text 8, none of these 1" in result.stderr


@pytest.mark.slow
def test_what_needs_no_torch_to_be_refused_does_not_load_it(root: str) -> None:
    mistakes = (
        ["train", "--model", "nope"],
        ["train", "--model", "sasrec", "--dataset", "nope"],
        ["train", "--model", "sasrec", "--set", "dim"],
        ["train", "--model", "sasrec", "--set", "dim=1", "--set", "dim=2"],
        ["train", "--resume", "--run", "nope"],
        ["eval", "--run", "nope"],
        ["eval", "--index", "nope"],
        ["recommend", "--user", "u0", "--run", "nope"],
        ["recommend", "--user", "u0", "--index", "nope"],
        ["recommend"],
        ["compare", "nope", "none"],
        ["report", "nope"],
    )
    code = (
        "import json, sys; from cli.app import app\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    try: app([*words, '--warehouse', sys.argv[2]])\n"
        "    except SystemExit as end: assert end.code == 2, words\n"
        "    if 'torch' in sys.modules: sys.exit(f'{words} imports torch')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(mistakes), root],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_tune_blocks_is_a_setting(root: str) -> None:
    to = ("--tune-blocks", "2", "--warehouse", root)
    refused = run("train", "--model", "sasrec", *to, code=2)
    assert re.search(r"tune_blocks=2 .* \(.*mmsr, pmmrec\), not sasrec", refused.stderr)
    refused = run("pretrain", "--model", "pmmrec", *to, code=2)
    assert "tune_blocks=2 trains the blocks above a table layer-K" in refused.stderr
    twice = run("train", "--model", "pmmrec", "--set", "tune_blocks=1", *to, code=2)
    assert "gives 'tune_blocks' twice" in twice.stderr
