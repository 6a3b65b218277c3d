"""A backbone that logs what it encodes, for the tests of extraction."""

from pathlib import Path

import pytest

from pipeline.backbones.registry import BACKBONES
from tests.pipeline.extraction.fakes import Watched, entry


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Return the backbone ``watched``, registered for one test."""
    backbone = Watched("watched", tmp_path / "encoded.txt")
    monkeypatch.setitem(BACKBONES, "watched", entry(backbone))
    return backbone
