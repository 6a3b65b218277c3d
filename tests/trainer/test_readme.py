"""trainer/README.md lists every file, states the order of imports, and its examples train."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from features.registry import Registry
from features.warehouse import Warehouse
from tests.trainer import worlds
from trainer.losses.registry import LOSSES
from trainer.models.registry import MODELS, Model
from trainer.modules.registry import FUSIONS, SEQUENCE_ENCODERS
from trainer.runs.train import train_run
from trainer.tasks.registry import TASKS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "trainer"
README = (PACKAGE / "README.md").read_text(encoding="utf-8")
SMALL = ["epochs=1", "dim=8", "device=cpu"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def examples() -> dict[str, str]:
    """Return the code of each example by the name of its file, such as ``models/fpmc``."""
    names = re.findall(r"complete `trainer/([\w/]+)\.py`", README)
    codes = [code for code in blocks("python") if code.startswith('"""')]
    return dict(zip(names, codes, strict=True))


def section(title: str) -> str:
    return README.partition(f"## {title}\n")[2].partition("\n## ")[0]


def order() -> list[set[str]]:
    lines = re.findall(r"^\d+\. (.*)$", section("The order of imports"), re.MULTILINE)
    return [set(re.findall(r"`(\w+)`", line)) for line in lines]


def imported(path: Path) -> set[str]:
    """Return the folders and files of trainer that a file imports."""
    modules: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            modules.append(node.module or "")
        elif isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
    parts = [module.split(".") for module in modules]
    return {names[1] for names in parts if names[0] == "trainer" and len(names) > 1}


def test_the_table_lists_every_folder_and_file() -> None:
    table = README.partition("## The order of imports")[0]
    column = "".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))
    listed = set(re.findall(r"`([\w.]+)/?`", column))
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert listed == folders | {path.name for path in PACKAGE.glob("[!_]*.py")}


def test_imports_follow_the_order() -> None:
    lines = order()
    levels = {name: level for level, names in enumerate(lines) for name in names}
    assert sum(map(len, lines)) == len(levels)
    for path in PACKAGE.rglob("[!_]*.py"):
        relative = path.relative_to(PACKAGE)
        own = relative.parts[0].removesuffix(".py")
        upward = {name for name in imported(path) if levels[name] > levels[own]}
        assert not upward, f"{relative} imports {sorted(upward)}"


def test_no_two_folders_of_one_line_import_each_other() -> None:
    edges: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("[!_]*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        edges.setdefault(own, set()).update(imported(path) - {own})
    assert not [(a, b) for a in edges for b in edges[a] if a in edges.get(b, set())]


@pytest.mark.parametrize("title", ["The way of a batch", "How `--set dim=64` reaches the loss"])
def test_a_walk_has_at_most_ten_steps(title: str) -> None:
    steps = [int(step) for step in re.findall(r"^(\d+)\. ", section(title), re.MULTILINE)]
    assert steps == list(range(1, len(steps) + 1))
    assert 0 < len(steps) <= 10
    for path in re.findall(r"`([\w/]+\.py)`", section(title)):
        assert (PACKAGE / path).exists() or (ROOT / path).exists(), path


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples as files of trainer with their lines in the registries, undone afterwards."""
    modules = {}
    for name, code in examples().items():
        dotted = f"trainer.{name.replace('/', '.')}"
        module = ModuleType(dotted)
        monkeypatch.setitem(sys.modules, dotted, module)
        exec(compile(code, f"{name}.py", "exec"), vars(module))
        modules[name] = vars(module)
    (line,) = [code for code in blocks("python") if code.startswith('"')
               and not code.startswith('"""')]  # fmt: skip
    lines: dict[str, tuple[Registry[Any], str]] = {
        "models/fpmc": (MODELS, line),
        "losses/hinge": (LOSSES, re.findall(r'is `("hinge": \w+)`', README)[0]),
        "modules/max_fusion": (FUSIONS, re.findall(r'is `("max": \w+)`', README)[0]),
        "modules/mean_encoder": (SEQUENCE_ENCODERS, re.findall(r'is `("mean": \w+)`', README)[0]),
    }
    assert lines.keys() == modules.keys()
    for name, (registry, entry) in lines.items():
        for key, value in eval(f"{{{entry}}}", {"Model": Model, **modules[name]}).items():
            monkeypatch.setitem(registry, key, value)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("fpmc", []),
        ("fpmc", ["loss=hinge"]),
        ("sasrec", ["loss=hinge"]),
        ("mmsr", ["fusion=max", "fusion_heads=2"]),
        ("mmsr", ["sequence_encoder=mean", "fusion_heads=2"]),
    ],
)
def test_an_example_trains(
    registered: None, warehouse: Warehouse, model: str, settings: list[str]
) -> None:
    world = worlds.cycles()
    rows = [
        world.items[a:b].tolist() for a, b in zip(world.offsets, world.offsets[1:], strict=False)
    ]
    worlds.prepare(warehouse, rows, world.info.items)
    worlds.extract(warehouse, worlds.features(world.info.items))
    run = worlds.begin(warehouse, model, settings=[*SMALL, *settings])
    report = train_run(run)
    assert report.finished
    assert 0 <= report.best <= 1


def test_the_example_model_learns_transitions(registered: None, warehouse: Warehouse) -> None:
    world = worlds.cycles()
    rows = [
        world.items[a:b].tolist() for a, b in zip(world.offsets, world.offsets[1:], strict=False)
    ]
    worlds.prepare(warehouse, rows, world.info.items)
    settings = ["epochs=20", "dim=16", "lr=0.05", "device=cpu", "monitor=HR@5"]
    assert train_run(worlds.begin(warehouse, "fpmc", settings=settings)).best > 0.95


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with the examples as an installed package, as pip would leave it."""
    code = tmp_path / "site" / "my_recommenders"
    code.mkdir(parents=True)
    (code / "__init__.py").write_text("")
    for name, text in examples().items():
        (code / f"{name.partition('/')[2]}.py").write_text(text)
    (entries,) = [text for text in blocks("python") if "my_recommenders" in text]
    (code / "entries.py").write_text(entries)
    (document,) = map(tomllib.loads, blocks("toml"))
    project = document["project"]
    about = code.parent / "my_recommenders-1.0.dist-info"
    about.mkdir()
    lines = [f"Name: {project['name']}", f"Version: {project['version']}"]
    (about / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines, ""]))
    points = [
        "\n".join([f"[{group}]", *(f"{name} = {target}" for name, target in named.items())])
        for group, named in project["entry-points"].items()
    ]
    (about / "entry_points.txt").write_text("\n".join([*points, ""]))
    return code.parent


def mmrec(package: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "cli.app", *arguments, "--json"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.mark.slow
def test_the_examples_work_from_another_package(package: Path, warehouse: Warehouse) -> None:
    listed = mmrec(package, "models")
    assert not listed["broken"]
    origins = {model["model"]: model["origin"] for model in listed["models"]}
    assert origins["fpmc"] == "my-recommenders 1.0"
    worlds.prepare(warehouse, [[i, i + 1, i + 2, i + 3] for i in range(4)], 7)
    worlds.extract(warehouse, worlds.features(7))
    settings = [*SMALL, "loss=hinge", "fusion=max", "sequence_encoder=mean", "fusion_heads=2"]
    sets = [word for setting in settings for word in ("--set", setting)]
    root = ("--warehouse", str(warehouse.root))
    assert mmrec(package, "train", "--model", "mmsr", *sets, *root)["finished"]


def test_every_group_of_entry_points_is_named() -> None:
    from pipeline.backbones.registry import BACKBONES
    from pipeline.datasets.importers.registry import IMPORTERS
    from pipeline.datasets.registry import DATASETS

    registries: list[Registry[Any]] = [
        MODELS, LOSSES, FUSIONS, SEQUENCE_ENCODERS, TASKS, BACKBONES, IMPORTERS, DATASETS,
    ]  # fmt: skip
    for registry in registries:
        assert registry.group in section("Add them from another package")
