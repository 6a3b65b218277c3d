"""``mmrec export-features``: what it writes is what mmrec import-features reads."""

import json
from pathlib import Path

import numpy as np

from features.store import FeatureStore
from features.warehouse import Warehouse
from tests.cli.invoke import run


def test_exported_vectors_are_imported_again(root: str, tmp_path: Path) -> None:
    npy, ids = str(tmp_path / "v.npy"), str(tmp_path / "ids.txt")
    words = ("--npy", npy, "--ids", ids, "--warehouse", root)
    printed = run("export-features", "--features", "text=toy", *words, "--json").stdout
    store = FeatureStore(Warehouse(root))
    stored = store.read("world", "text", "toy")
    vectors, names = np.load(npy), Path(ids).read_text().split()
    assert json.loads(printed)["shape"] == list(vectors.shape)
    assert np.array_equal(vectors, stored.vectors[stored.present])
    assert names == [f"i{item}" for item in stored.present.nonzero()[0]]
    run("import-features", "--text", npy, "--ids", ids, "--name", "again", "--warehouse", root)
    again = store.read("world", "text", "again")
    assert np.array_equal(again.present, stored.present)
    assert np.abs(again.vectors - stored.vectors).max() < 1e-3


def test_a_table_is_named_where_there_are_several(root: str, tmp_path: Path) -> None:
    words = ("--npy", str(tmp_path / "v.npy"), "--ids", str(tmp_path / "i"), "--warehouse", root)
    stderr = run("export-features", *words, code=2).stderr
    assert "image=toy, text=toy" in stderr
    assert "--features" in stderr
    assert not list(tmp_path.glob("[vi]*"))
