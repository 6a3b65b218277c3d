"""The tests with the marker ``gpu``, by pytest in a process of its own."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from tests.gpu.parts import Report, Setup, Skip

_ROOT = Path(__file__).parents[2]
_MARKER = "pytest.mark.gpu"
_NEEDED = ("pytest", "hypothesis")  # the latter by `tests/conftest.py`


def run(setup: Setup, report: Report) -> None:
    """Report how many tests have passed, failed and been skipped."""
    for package in _NEEDED:
        if importlib.util.find_spec(package) is None:
            raise Skip(f"{package} is not installed")
    if setup.device != "cuda":
        raise Skip("no GPU: the suite has skipped these tests")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rfEs", "-p", "no:cacheprovider"]
    # The stand-ins come before `tests/conftest.py`, which imports mmrec.
    command += ["--continue-on-collection-errors", "-p", "tests.gpu.stand_ins"]
    # A bare machine can lack plugins that the configuration names, and another torch warns.
    command += ["-o", "addopts=--import-mode=importlib", "-o", "filterwarnings=default"]
    command += marked_files()
    try:
        done = subprocess.run(
            command, cwd=_ROOT, capture_output=True, text=True, timeout=setup.seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"pytest has run for {setup.seconds:.0f} seconds") from None
    lines = done.stdout.splitlines() or done.stderr.splitlines() or [""]
    report("summary", lines[-1])
    report("remarks", [line[:300] for line in lines if re.match("FAILED|ERROR|SKIPPED", line)])
    if done.returncode:
        raise RuntimeError(f"pytest ended with exit code {done.returncode}: {lines[-1]}")


def marked_files() -> list[str]:
    """Return the files with such tests, relative to the repository."""
    files = sorted((_ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(_ROOT)) for file in files if _MARKER in file.read_text("utf-8")]
