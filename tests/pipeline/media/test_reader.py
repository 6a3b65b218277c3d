import os
import pickle
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image

from features.store import FeatureStore
from features.warehouse import Warehouse
from pipeline.extraction.job import extract_features
from pipeline.extraction.options import ExtractOptions
from pipeline.media import reader
from pipeline.media.errors import MediaError
from pipeline.media.reader import MediaReader
from tests.pipeline.backbones.tiny import prepare
from tests.pipeline.media.test_images import encoded


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")  # reading it would wait for ever
    (tmp_path / "big.jpg").write_bytes(b"x" * 2_000_000)
    monkeypatch.setattr(reader, "MAX_FILE_BYTES", 1 << 20)
    media = MediaReader(tmp_path)
    for name, reason in {
        "empty.jpg": "empty file",
        "folder.jpg": "is a folder",
        "pipe.jpg": "is not a regular file",
        "big.jpg": "file larger than 1 MiB",
        "none.jpg": "file not found",
        "none.lmdb#1": "file not found",
        "empty.jpg/under": "NotADirectoryError: ",
        "nu\0ll.jpg": "ValueError: embedded null byte",
    }.items():
        with pytest.raises(MediaError) as caught:
            media.read(name)
        assert caught.value.stage == "read"
        assert caught.value.reason.startswith(reason)
    for name in ("empty.jpg", "folder.jpg", "pipe.jpg", "none.jpg"):
        with pytest.raises(MediaError):
            media.open(name)


class LMDB_Image:  # noqa: N801 - the class name in released LMDBs
    def __init__(self, image: Image.Image) -> None:
        self.channels = len(image.getbands())
        self.size = (image.height, image.width)
        self.image = image.tobytes()


def test_images_in_an_lmdb(tmp_path: Path, warehouse: Warehouse) -> None:
    path = tmp_path / "raw" / "covers.lmdb"
    path.parent.mkdir()
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (12, 9, 3), dtype=np.uint8))
    file = encoded(image, "PNG")
    with lmdb.open(str(path), subdir=False, map_size=1 << 20) as env, env.begin(write=True) as put:
        put.put(b"v#1", file)
        put.put(b"v2", pickle.dumps(LMDB_Image(image), protocol=5))
        put.put(b"bad", b"\x80\x04cposix\nsystem\n.")
    media = MediaReader(path.parent)
    assert media.read("covers.lmdb#v#1") == file
    media.close()
    assert media.read("covers.lmdb#v#1") == file  # opened again
    media.close()
    ids = ["v#1", "v2", "v3", "bad", "again"]
    references = [f"covers.lmdb#{key}" for key in [*ids[:4], "v2"]]
    info = prepare(warehouse, path.parent, ids=ids, image=references)
    report = extract_features(warehouse, "tiny", ExtractOptions(image="hashed")).tables[0]
    assert (report.encoded, report.shared) == (2, 1)
    assert report.failed == {
        "no such key in the LMDB": 1,
        "not an image of the kind that LMDBs hold": 1,
    }
    table = FeatureStore(warehouse).table("tiny", "hashed", "image")
    vectors = table.read(info.items, info.fingerprint, info.inputs["image"]).vectors
    assert (vectors[1] == vectors[4]).all()
    assert np.abs(vectors[0] - vectors[1]).max() < 1e-3  # the same pixels, encoded and as pixels


def test_every_odd_file_is_a_vector_or_a_failure(warehouse: Warehouse, real_data: Path) -> None:
    raw = real_data / "weird"
    names = [f"images/{path.name}" for path in sorted((raw / "images").iterdir())]
    prepare(warehouse, raw, ids=names, image=names)
    report = extract_features(warehouse, "tiny", ExtractOptions(image="hashed")).tables[0]
    assert sum(report.failed.values()) == 8
    assert report.encoded + report.shared == len(names) - 8
