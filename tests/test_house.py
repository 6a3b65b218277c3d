"""The structure of the repository: the order of imports, the names, and the top level."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each package, and the packages that it may import.
PACKAGES = {
    "features": set(),
    "retrieval": set(),
    "pipeline": {"features"},
    "trainer": {"features", "retrieval"},
    "cli": {"features", "retrieval", "pipeline", "trainer"},
}
# The folders and files of trainer. Each imports only from the lines above its own line.
TRAINER_ORDER = (
    {"config", "setting_sources", "distributed", "checkpoint", "ema", "interruption", "kernels"},
    {"data"},
    {"losses"},
    {"modules"},
    {"finetune"},
    {"models"},
    {"optimizer", "step_losses", "step_memory", "evaluation"},
    {"tasks"},
    {"loop"},
    {"tracking"},
    {"runs"},
    {"analysis"},
)
TOP_LEVEL = {
    "pyproject.toml", "README.md", "pipeline", "features", "trainer", "retrieval", "cli", "tests",
    "warehouse", "LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt", ".gitignore", ".ci",
    ".github", ".pre-commit-config.yaml",
}  # fmt: skip


def imported_names(source: str) -> set[str]:
    """Return the dotted names that a file imports anywhere; a relative import begins with a dot."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def part_imports(package: Path) -> dict[str, set[str]]:
    """Return the folders and files of a package, each with the other ones that it imports."""
    imports: dict[str, set[str]] = {}
    for path in sorted(package.rglob("*.py")):
        part = path.relative_to(package).parts[0].removesuffix(".py")
        names = [name.split(".") for name in imported_names(path.read_text(encoding="utf-8"))]
        others = {name[1] for name in names if name[0] == package.name and len(name) > 1}
        imports.setdefault(part, set()).update(others - {part})
    return imports


def upward_imports(imports: Mapping[str, set[str]], order: Sequence[set[str]]) -> set[str]:
    """Return ``a -> b`` for each import from the same line of the order, or from a later one."""
    line = {part: number for number, parts in enumerate(order) for part in parts}
    return {
        f"{part} -> {other}"
        for part, others in imports.items()
        for other in others
        if line[other] >= line[part]
    }


def write_package(root: Path, sources: Mapping[str, str]) -> Path:
    """Write the files of a package ``trainer``."""
    for name, source in sources.items():
        path = root / "trainer" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return root / "trainer"


@pytest.mark.parametrize("package", list(PACKAGES))
def test_packages_import_downward_only(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        names = imported_names(path.read_text(encoding="utf-8"))
        packages = {name.split(".")[0] for name in names}
        upward = (packages & set(PACKAGES)) - PACKAGES[package] - {package}
        assert not upward, f"{path.relative_to(ROOT)} imports {sorted(upward)}"
        assert "" not in packages, f"{path.relative_to(ROOT)} has a relative import"


def test_every_form_of_import_is_seen() -> None:
    source = (
        "import trainer.loop\nfrom . import x\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from pipeline.media import video\n"
        "def f():\n    from cli import app\n"
    )
    assert imported_names(source) == {
        "trainer.loop", "..x", "typing.TYPE_CHECKING", "pipeline.media.video", "cli.app",
    }  # fmt: skip


@pytest.mark.parametrize("package", list(PACKAGES))
def test_the_folders_and_files_of_a_package_import_each_other_in_no_circle(package: str) -> None:
    TopologicalSorter(part_imports(ROOT / package)).prepare()


def test_a_circle_of_folders_is_seen(tmp_path: Path) -> None:
    package = write_package(
        tmp_path,
        {
            "models/base.py": "from trainer.losses import softmax",
            "losses/softmax.py": "import torch\nfrom trainer.loop import fit",
            "loop.py": "def fit():\n    import trainer.models.base",
        },
    )
    imports = part_imports(package)
    assert imports == {"models": {"losses"}, "losses": {"loop"}, "loop": {"models"}}
    with pytest.raises(CycleError, match="cycle"):
        TopologicalSorter(imports).prepare()


def test_the_folders_and_files_of_trainer_import_downward_only() -> None:
    imports = part_imports(ROOT / "trainer")
    listed = set().union(*TRAINER_ORDER)
    assert imports.keys() - {"__init__"} == listed, "TRAINER_ORDER and trainer/README.md list all"
    assert not upward_imports(imports, TRAINER_ORDER)


def test_an_upward_import_inside_trainer_is_seen(tmp_path: Path) -> None:
    package = write_package(
        tmp_path,
        {
            "kernels/attention.py": "from trainer.data.batches import Batch",
            "data/batches.py": "from trainer import kernels",
            "data/windows.py": "from trainer.data.batches import Batch",
            "models/base.py": "from trainer import evaluation, losses",
            "runs/run.py": "from trainer.loop import fit\nimport trainer.config",
            "optimizer.py": "def f():\n    from trainer.evaluation.encode import encode",
        },
    )
    assert upward_imports(part_imports(package), TRAINER_ORDER) == {
        "kernels -> data", "models -> evaluation", "optimizer -> evaluation",
    }  # fmt: skip


def test_the_readme_of_trainer_states_the_same_order() -> None:
    text = (ROOT / "trainer" / "README.md").read_text(encoding="utf-8")
    section = text.partition("## The order of imports")[2].partition("\n## ")[0]
    lines = re.findall(r"^\d+\. (`.+`)$", section, re.MULTILINE)
    assert [set(re.findall(r"`(\w+)`", line)) for line in lines] == list(TRAINER_ORDER)


@pytest.mark.parametrize("package", list(PACKAGES))
def test_an_init_file_is_one_line_of_documentation(package: str) -> None:
    for path in (ROOT / package).rglob("__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert len(body) == 1, path
        assert len((ast.get_docstring(ast.Module(body, [])) or "\n").splitlines()) == 1, path


def test_no_other_distribution_installs_our_packages() -> None:
    owners = importlib.metadata.packages_distributions()
    others = {name: set(owners.get(name, [])) - {"mmrec"} for name in PACKAGES}
    assert not {name: distributions for name, distributions in others.items() if distributions}


def test_the_top_level_has_no_other_entries() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    if not tracked:
        pytest.skip("not a git checkout")
    assert {name.split("/")[0] for name in tracked} <= TOP_LEVEL


@pytest.mark.slow
def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from cli.app import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'faiss', 'duckdb', 'pyarrow', 'av'} & set(sys.modules)\n"
        "sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
