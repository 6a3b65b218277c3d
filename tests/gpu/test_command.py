"""The command on a CPU with tiny sizes, as CI runs it, and its processes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.__main__ import main
from tests.gpu.child import outcome_of, run_part
from tests.gpu.parts import PARTS, Part, Setup, Skip

ROOT = Path(__file__).parents[2]
# What mmrec's dependencies, extras and tests install in addition to torch and NumPy.
NEITHER_TORCH_NOR_NUMPY = [
    *("PIL", "av", "duckdb", "faiss", "filelock", "huggingface_hub", "hypothesis", "jinja2"),
    *("lmdb", "matplotlib", "onnx", "onnxruntime", "open_clip", "optuna", "pandas", "pyarrow"),
    *("pytest", "ray", "rich", "safetensors", "scipy", "sentence_transformers", "sklearn"),
    *("tensorboard", "timm", "tokenizers", "tomli_w", "torchvision", "tqdm", "transformers"),
    "typer",
]
_SITE = """
import sys
from importlib.machinery import PathFinder

class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            return None
        return super().find_spec(name, path, target)

sys.meta_path[:] = [Installed if finder is PathFinder else finder for finder in sys.meta_path]
"""


def run_command(tmp_path: Path, absent: list[str], *parts: str) -> dict[str, Any]:
    """Run parts where some packages are not installed; return the results."""
    (tmp_path / "sitecustomize.py").write_text(_SITE.format(absent=absent))
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "tests.gpu", "--device", "cpu", "--small", "--out", str(out)]
    done = subprocess.run(
        [*command, "--seconds", "200", "--parts", *parts],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"| {name} |" in done.stdout for name in ("machine", *parts))
    results: dict[str, Any] = json.loads(out.read_text())
    return results


def test_torch_and_numpy_are_enough(tmp_path: Path) -> None:
    results = run_command(tmp_path, NEITHER_TORCH_NOR_NUMPY, *PARTS)
    outcomes = {name: results[name]["outcome"] for name in ("machine", *PARTS)}
    assert outcomes.pop("tests") == "skipped: pytest is not installed"
    assert outcomes.pop("extraction") == "skipped: transformers is not installed"
    assert outcomes.pop("syncs").startswith("skipped: no GPU")
    assert set(outcomes.values()) == {"done"}
    assert {"pyarrow", "faiss"} <= set(results["machine"]["not installed"].split(", "))
    assert results["ranking"]["faiss:gpu"] == "not measured: no GPU"
    assert {"date", "device", "small"} <= results.keys()
    assert results["machine"]["torch"]
    assert results["agreement"]["mmsrec"]["gradients"] < 1e-3
    assert results["agreement"]["vqrec"]  # FAISS is not installed: figures, or its name
    assert results["steps"]["mmsrec, float32"]["steps a second"] > 0
    operator, naive = (
        results["contrastive"][f"{way}, 100 pairs, float32"]["loss"]
        for way in ("operator, both", "naive, both")
    )
    assert operator == pytest.approx(naive, rel=1e-3)
    assert results["pretraining"]["float32, batches of 100"]["pairs a second"] > 0
    assert results["ranking"]["rank, random queries"]["users a second"] > 0


def test_images_are_extracted_without_a_database(tmp_path: Path) -> None:
    results = run_command(tmp_path, ["av", "duckdb", "faiss", "tomli_w"], "extraction")
    assert results["extraction"]["outcome"] == "done"
    figures = results["extraction"]["tiny, random weights, bfloat16: extraction, draft decoding"]
    assert figures["images a second"] > 0
    assert {"decode", "resize", "copy and forward", "write"} == {
        name.removeprefix("seconds of ") for name in figures if name.startswith("seconds of ")
    }


@pytest.mark.parametrize("words", [("--seconds", "0"), ("--out", "no-such-folder/results.json")])
def test_options_that_cannot_be_used_are_one_line(
    words: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "--small", *words])
    assert f"error: {words[0]} {words[1]}" in capsys.readouterr().err


def _raise() -> None:
    raise ValueError("first line\nsecond line")


def _skip() -> None:
    raise Skip("no card")


def _import() -> None:
    raise ModuleNotFoundError("No module named 'liger.ops'", name="liger.ops")


def _import_own() -> None:
    raise ModuleNotFoundError("No module named 'trainer.gone'", name="trainer.gone")


@dataclass(frozen=True)
class Calls(Part):
    """A part that calls a function."""

    work: Callable[[], object]

    def run(self, setup: Setup, report: Callable[[str, Any], None]) -> None:
        report("first", 1)
        self.work()
        report("second", 2)


@dataclass(frozen=True)
class Hangs(Part):
    """A part that never ends."""

    def run(self, setup: Setup, report: Callable[[str, Any], None]) -> None:
        report("first", 1)
        time.sleep(600)


@pytest.mark.parametrize(
    ("work", "outcome"),
    [
        (time.time, "done"),
        (_raise, "failed: ValueError: first line"),
        (_skip, "skipped: no card"),
        (_import, "skipped: liger is not installed"),
        (_import_own, "failed: No module named 'trainer.gone'"),
        (sys.exit, "failed: SystemExit: "),
    ],
)
def test_outcomes_are_one_line(work: Callable[[], object], outcome: str) -> None:
    assert outcome_of(work) == outcome


@pytest.mark.parametrize(
    ("work", "outcome", "figures"),
    [
        (time.time, "done", ["first", "second"]),
        (os.abort, "failed: the process ended with exit code -6", ["first"]),
    ],
)
def test_a_part_ends_alone(work: Callable[[], object], outcome: str, figures: list[str]) -> None:
    """A process for a GPU is a new one; these parts do not touch the GPU."""
    reported: list[str] = []
    setup = Setup(device="cuda", small=True, seconds=60)
    part = Calls("none", 1, "calls a function", work)
    assert run_part(part, setup, lambda name, value: reported.append(name)) == outcome
    assert reported == figures


def test_a_part_that_hangs_is_killed_and_keeps_its_figures() -> None:
    reported: list[str] = []
    setup = Setup(device="cuda", small=True, seconds=1.2)
    part = Hangs("none", 1, "hangs")
    began = time.monotonic()
    outcome = run_part(part, setup, lambda name, value: reported.append(name))
    assert outcome.startswith("failed: stopped after")
    assert reported == ["first"]
    assert time.monotonic() - began < 20
