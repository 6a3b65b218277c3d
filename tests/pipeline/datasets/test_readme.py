"""The examples of pipeline/datasets/README.md run as they are printed."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.datasets.importers.base import Importer
from pipeline.datasets.importers.registry import IMPORTERS
from pipeline.datasets.registry import DATASETS, KnownDataset

README = Path(__file__).parents[3] / "pipeline" / "datasets" / "README.md"


def blocks(language: str) -> list[str]:
    """Return the code blocks of a language, in the order of the file."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def registries() -> Iterator[None]:
    """Remove the entries that the examples add."""
    known: list[tuple[Any, set[str]]] = [
        (registry, set(registry)) for registry in (DATASETS, IMPORTERS)
    ]
    yield
    for registry, names in known:
        for name in set(registry) - names:
            del registry[name]


def test_the_examples_run(
    registries: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names: dict[str, Any] = {}
    for code in blocks("python"):
        exec(compile(code, str(README), "exec"), names)
    assert list(tmp_path.rglob("dataset.json"))
    (document,) = map(tomllib.loads, blocks("toml"))
    entry_points = document["project"]["entry-points"]
    expected = {"mmrec.importers": Importer, "mmrec.datasets": KnownDataset}
    assert entry_points.keys() == expected.keys()
    for group, points in entry_points.items():
        for target in points.values():
            assert isinstance(names[target.partition(":")[2]], expected[group])
