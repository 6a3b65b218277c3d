"""Checkpoints that several files of tests read."""

from pathlib import Path

import pytest

from tests.pipeline.backbones.checkpoints import (
    open_clip_folder,
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return open_clip_folder(tmp_path_factory.mktemp("checkpoints") / "My CLIP")
