"""A repeated extraction loads no backbone if nothing has changed."""

import os
from pathlib import Path

import pytest

from features.store import FeatureStore
from features.warehouse import Warehouse
from pipeline.backbones.registry import BACKBONES
from pipeline.extraction.job import extract_features
from pipeline.extraction.options import ExtractOptions
from pipeline.extraction.reports import ExtractReport
from tests.pipeline.backbones.tiny import picture, prepare
from tests.pipeline.extraction.fakes import Watched, entry

IDS, TEXT, IMAGE = ["a", "b", "c"], ["red", "blue", None], ["0.png", "1.png", "0.png"]


class Loaded(Watched):
    """A backbone with a file of weights; counts how often it is loaded."""

    loads = 0

    @property
    def entry(self) -> object:
        def make(name: str, device: str | None, compute: str) -> Watched:
            self.loads += 1
            return self

        made = entry(self)
        return type(made)(
            modalities=made.modalities, dim=made.dim, library="tests", checkpoint="1", make=make
        )


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"1")
    return path


@pytest.fixture
def backbone(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    loaded = Loaded("loaded", tmp_path / "log.txt")
    loaded.weight_files = (weights,)
    monkeypatch.setitem(BACKBONES, "loaded", loaded.entry)
    return loaded


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for seed in range(2):
        picture(tmp_path / "raw" / f"{seed}.png", seed)
    return tmp_path / "raw"


def extract(warehouse: Warehouse, **options: str) -> ExtractReport:
    chosen = ExtractOptions(**{"image": "loaded", "text": "loaded", **options})  # type: ignore[arg-type]
    return extract_features(warehouse, "tiny", chosen)


def test_nothing_is_loaded_where_nothing_has_changed(
    warehouse: Warehouse, raw: Path, backbone: Loaded
) -> None:
    prepare(warehouse, raw, ids=IDS, text=TEXT, image=IMAGE)
    first = extract(warehouse)
    again = extract(warehouse)
    assert backbone.loads == 1
    assert [(row.reused, row.encoded, row.absent) for row in again.tables] == [(3, 0, 0), (2, 0, 1)]
    for before, after in zip(first.tables, again.tables, strict=True):
        assert (before.path, before.dim, before.bytes) == (after.path, after.dim, after.bytes)


def test_each_change_is_seen(
    warehouse: Warehouse, raw: Path, weights: Path, backbone: Loaded
) -> None:
    prepare(warehouse, raw, ids=IDS, text=TEXT, image=IMAGE)
    extract(warehouse)

    picture(raw / "1.png", 7)  # the same name, other pixels
    assert extract(warehouse).tables[0].encoded == 1
    prepare(warehouse, raw, ids=[*IDS, "d"], text=[*TEXT, "green"], image=[*IMAGE, None])
    assert extract(warehouse).tables[1].encoded == 1
    assert backbone.loads == 3

    backbone.checkpoint = "other weights"
    state = weights.stat()
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert sum(row.encoded for row in extract(warehouse, overwrite="yes").tables) == 5
    assert backbone.loads == 4
    for table in FeatureStore(warehouse).tables("tiny"):
        table.parts()[0].unlink()
    assert sum(row.encoded for row in extract(warehouse).tables) == 5


def test_an_input_that_failed_is_tried_again(
    warehouse: Warehouse, raw: Path, backbone: Loaded
) -> None:
    (raw / "1.png").write_bytes(b"no image")
    prepare(warehouse, raw, ids=IDS, text=TEXT, image=IMAGE)
    assert extract(warehouse).tables[0].failed
    assert extract(warehouse).tables[0].failed
    assert backbone.loads == 2
