"""The house keeps its shape: imports run downward, names are ours, captions are one line."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BELOW = {
    "features": set(),
    "retrieval": set(),
    "pipeline": {"features"},
    "trainer": {"features", "retrieval"},
    "cli": {"features", "retrieval", "pipeline", "trainer"},
}
TOP = {
    "pyproject.toml", "README.md", "pipeline", "features", "trainer", "retrieval", "cli", "tests",
    "warehouse", "LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt",
}  # fmt: skip


def imports(source: str) -> tuple[set[str], bool]:
    """Top-level packages that a file imports, and whether one import is relative."""
    found: set[str] = set()
    relative = False
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            relative |= node.level > 0
            found.add((node.module or "").split(".")[0])
    return found, relative


@pytest.mark.parametrize("room", list(BELOW))
def test_imports_run_downward_only(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        found, relative = imports(path.read_text(encoding="utf-8"))
        upward = (found & set(BELOW)) - BELOW[room] - {room}
        assert not upward, f"{path.relative_to(ROOT)} imports {sorted(upward)}"
        assert not relative, f"{path.relative_to(ROOT)} has a relative import"


def test_the_check_of_imports_bites() -> None:
    assert imports("import trainer.loop\ndef f():\n    from cli import app") == (
        {"trainer", "cli"},
        False,
    )
    assert imports("from . import x")[1]


@pytest.mark.parametrize("room", list(BELOW))
def test_captions_are_one_docstring_line(room: str) -> None:
    for path in (ROOT / room).rglob("__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert len(body) == 1, path
        assert len((ast.get_docstring(ast.Module(body, [])) or "\n").splitlines()) == 1, path


def test_no_stranger_bears_our_names() -> None:
    owners = importlib.metadata.packages_distributions()
    strangers = {name: set(owners.get(name, [])) - {"mmrec"} for name in BELOW}
    assert not {name: who for name, who in strangers.items() if who}


def test_the_top_level_is_the_customers() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in listed}
    assert not {name for name in top - TOP if not name.startswith(".")}


@pytest.mark.slow
def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from cli.app import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'faiss', 'duckdb', 'pyarrow', 'av'} & set(sys.modules)\n"
        "sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
