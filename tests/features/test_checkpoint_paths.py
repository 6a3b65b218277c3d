"""Paths that the documents of a checkpoint name stay in its folder."""

import json
from pathlib import Path

import pytest

from features.checkpoint_paths import check_shards, named_path
from features.errors import UserError

OUTSIDE = ["../other", "1_Pooling/../../other", "/other", "..\\other", "C:\\other", "a\0b", "link"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    (folder / "1_Pooling").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (folder / "link").symlink_to(tmp_path / "other")
    return folder


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_path_out_of_the_folder_is_refused(folder: Path, path: str) -> None:
    with pytest.raises(UserError, match=r"modules\.json.*out of the folder") as refusal:
        named_path(folder, "modules.json", path)
    assert repr(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("path", ["", ".", "1_Pooling", "absent", "a..b"])
def test_a_path_in_the_folder_is_returned(folder: Path, path: str) -> None:
    assert named_path(folder, "modules.json", path) == folder / path


@pytest.mark.parametrize("shard", OUTSIDE)
def test_a_shard_out_of_the_folder_is_refused(folder: Path, shard: str) -> None:
    weights = {"a": "model-1.safetensors", "b": shard}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(UserError, match=r"index\.json.*out of the folder"):
        check_shards(folder)


def test_links_of_the_hub_cache_are_allowed(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "revision"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "hash").touch()
    (snapshot / "model-1.safetensors").symlink_to("../../blobs/hash")
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    check_shards(snapshot)
