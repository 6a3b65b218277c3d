"""A file that must not be read is not called damaged, whichever function reads it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from features.documents import read_json, read_toml
from features.errors import UserError
from features.warehouse import Warehouse
from tests.trainer import worlds
from trainer.checkpoint import read_tensors, save_weights
from trainer.runs.folder import read_about, stored_metrics
from trainer.runs.grid_file import read_grid
from trainer.runs.read import read_record
from trainer.setting_sources import read_flat


def _deny(monkeypatch: pytest.MonkeyPatch, denied: Path) -> None:
    """Deny the reading of one file, also to the superuser, who may read every file."""
    original = Path.open

    def open_unless_denied(path: Path, *args: Any, **options: Any) -> Any:
        if path == denied:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *args, **options)

    monkeypatch.setattr(Path, "open", open_unless_denied)


@pytest.mark.parametrize(
    "read",
    [
        lambda path: read_json(path, "train again"),
        lambda path: read_toml(path, "train again"),
        lambda path: read_tensors(path, "train again"),
        read_about,
        read_flat,
        read_grid,
        stored_metrics,
    ],
)
def test_every_reader_names_the_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], object]
) -> None:
    path = tmp_path / "file"
    save_weights(path, nn.Linear(2, 2), {})
    _deny(monkeypatch, path)
    with pytest.raises(UserError, match=f"{path}: no permission.*permissions"):
        read(path)


@pytest.mark.parametrize("name", ["config.toml", "model.safetensors"])
def test_a_run_that_must_not_be_read(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    worlds.prepare(warehouse, [[0, 1, 0, 1, 2, 3]] * 6, 6)
    run = worlds.begin(
        warehouse, "sasrec", settings=["dim=8", "hidden=8", "length=5", "device=cpu"], name="r"
    )
    save_weights(run.folder / "model.safetensors", nn.Linear(2, 2), {})
    _deny(monkeypatch, run.folder / name)
    with pytest.raises(UserError, match=f"{name}: no permission.*permissions"):
        read_record(warehouse, "r")
