"""Tars, LMDBs and images for tests."""

import io
import tarfile
from pathlib import Path

import lmdb
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pipeline.media.errors import MediaError
from pipeline.media.reader import MediaReader


def image_bytes(seed: int) -> bytes:
    """Return a small PNG; each seed gives another image."""
    stream = io.BytesIO()
    pixels = np.random.RandomState(seed).randint(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def tar(path: Path, content: dict[str, bytes], *, format: int = tarfile.GNU_FORMAT) -> Path:
    """Write a tar with these members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as into:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            into.addfile(member, io.BytesIO(data))
    return path


def refused(media: MediaReader, reference: str) -> str:
    """Return the reason why a reference cannot be read."""
    with pytest.raises(MediaError) as caught:
        media.read(reference)
    assert "\n" not in caught.value.reason
    return caught.value.reason


PIXELS = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)


class LMDB_Image:  # noqa: N801 - the class name in released LMDBs
    def __init__(self, image: npt.NDArray[np.uint8], item: str) -> None:
        self.channels = image.shape[2]
        self.size = image.shape[:2]
        self.image = image.tobytes()
        self.id = item


def write_lmdb(path: Path, values: dict[str, bytes], *, subdir: bool) -> Path:
    """Write an LMDB as a folder or as one file."""
    with lmdb.open(str(path), subdir=subdir, map_size=1 << 20) as env, env.begin(write=True) as to:
        for key, value in values.items():
            to.put(key.encode(), value)
    return path
