"""The example of pipeline/backbones/README.md runs as it is printed, and its table is complete."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.backbones import registry

FOLDER = Path(__file__).parents[3] / "pipeline" / "backbones"
TEXT = (FOLDER / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_the_example_registers_a_backbone_and_embeds_two_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (code,) = blocks("python")
    monkeypatch.setitem(registry.BACKBONES, "mean-colour", registry.BACKBONES["hashed"])  # undone
    namespace: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), namespace)
    assert np.allclose(namespace["vectors"], [[1, 0, 0], [1, 1, 1]])
    assert namespace["backbone"].name == "mean-colour"


def test_the_line_of_the_example_is_an_entry() -> None:
    (line, *_) = blocks("")
    table = eval(f"{{{line}}}", vars(registry))
    assert table["deit-b"].modalities == ("image", "video")


def test_every_file_is_listed() -> None:
    files = {path.name for path in FOLDER.glob("*.py")} - {"__init__.py"}
    table = "\n".join(line for line in TEXT.splitlines() if line.startswith("| `"))
    assert files <= set(re.findall(r"`(\w+\.py)`", table))


def test_the_way_of_an_image_has_at_most_ten_steps() -> None:
    steps = re.findall(r"^(\d+)\. ", TEXT, re.MULTILINE)
    assert [int(step) for step in steps] == list(range(1, len(steps) + 1))
    assert len(steps) <= 10
