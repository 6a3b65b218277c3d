import os
from pathlib import Path

import numpy as np
import pytest

from retrieval.approximate_indexes import ApproximateIndex
from retrieval.registry import make_index
from trainer.evaluation.saved_indexes import SavedIndexes

ITEMS = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
KINDS = ("faiss:ivf", "faiss:ivfpq", "faiss:hnsw")


def build(kind: str, folder: Path, stages: list[str] | None = None) -> ApproximateIndex:
    names: list[str] = [] if stages is None else stages
    index = make_index(kind, ITEMS, SavedIndexes(folder, names.append))
    assert isinstance(index, ApproximateIndex)
    return index


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_index_gives_the_same_lists(tmp_path: Path, kind: str) -> None:
    first, again = build(kind, tmp_path / "indexes"), build(kind, tmp_path / "indexes")
    assert (first.is_reused, again.is_reused) == (False, True)
    np.testing.assert_array_equal(first.search(ITEMS, 10)[1], again.search(ITEMS, 10)[1])
    assert [path.suffix for path in (tmp_path / "indexes").iterdir()] == [".faiss"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "other"])
def test_a_damaged_index_is_trained_again(tmp_path: Path, kind: str, damage: str) -> None:
    expected = build(kind, tmp_path).search(ITEMS, 5)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    content = {
        "bit": bytes(data),
        "cut": bytes(data[: len(data) // 3]),
        "empty": b"",
        "other": b"mmrec",
    }
    path.write_bytes(content[damage])
    stages: list[str] = []
    index = build(kind, tmp_path, stages)
    assert not index.is_reused
    assert len(stages) == 1
    np.testing.assert_array_equal(index.search(ITEMS, 5)[1], expected[1])
    assert build(kind, tmp_path).is_reused


def test_an_index_of_other_vectors_is_not_taken(tmp_path: Path) -> None:
    build("faiss:ivf", tmp_path)
    (path,) = tmp_path.iterdir()
    path.rename(path.with_name(path.name.replace(path.stem[-32:], "0" * 32)))
    store = SavedIndexes(tmp_path)
    assert store.load("ivf-nlist7", "0" * 32) is None


def test_the_latest_files_stay(tmp_path: Path) -> None:
    for lists in range(1, 8):
        build(f"faiss:ivf,nlist={lists}", tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    assert build("faiss:ivf,nlist=7", tmp_path).is_reused


def test_a_folder_that_cannot_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "indexes").write_text("a file")
    stages: list[str] = []
    index = build("faiss:ivf", tmp_path / "indexes", stages)
    assert index.search(ITEMS, 3)[1].shape == (300, 3)
    assert any("not saved" in stage for stage in stages)


def test_a_folder_with_the_name_of_an_index_is_left_as_it_is(tmp_path: Path) -> None:
    expected = build("faiss:ivf", tmp_path).search(ITEMS, 3)
    (path,) = tmp_path.iterdir()
    path.unlink()
    path.mkdir()
    stages: list[str] = []
    index = build("faiss:ivf", tmp_path, stages)
    np.testing.assert_array_equal(index.search(ITEMS, 3)[1], expected[1])
    assert any("not saved" in stage for stage in stages)
    assert path.is_dir()


@pytest.mark.timeout(60)
def test_a_pipe_with_the_name_of_an_index_is_not_read(tmp_path: Path) -> None:
    expected = build("faiss:ivf", tmp_path).search(ITEMS, 3)
    (path,) = tmp_path.iterdir()
    path.unlink()
    os.mkfifo(path)
    index = build("faiss:ivf", tmp_path)
    np.testing.assert_array_equal(index.search(ITEMS, 3)[1], expected[1])
    assert not index.is_reused
