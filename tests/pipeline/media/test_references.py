"""References: paths below the raw folder, and parts of containers."""

from pathlib import Path

import pytest

from pipeline.media.errors import MediaError
from pipeline.media.reader import MediaReader
from tests.pipeline.datasets.raws import folder
from tests.pipeline.media.containers import image_bytes, refused, tar


def test_what_leads_outside_is_never_read(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(image_bytes(0))
    tar(tmp_path / "secret.tar", {"1.png": image_bytes(0)})
    # Folders that look like containers would make a way out of their members' names.
    raw = folder(tmp_path / "raw", {"in.png": "x", "in.tar#/x": "", "in.tar#x/x": ""})
    media = MediaReader(raw, raw)
    for reference in (
        "../secret.png", "x/../../secret.png", f"{tmp_path}/secret.png", "../secret.tar#1.png",
        "prepared:../secret.png", "in.png#../../../secret.png", "in.tar#/../../secret.png",
        "in.tar#x/../../../secret.png",
    ):  # fmt: skip
        assert refused(media, reference) == "leads outside the raw folder", reference
    with pytest.raises(MediaError, match="leads outside"):
        media.open("../secret.png")
    assert refused(MediaReader(tmp_path), "prepared:secret.png") == "leads outside the raw folder"


def test_a_plain_file_may_be_named_like_a_part_of_a_container(tmp_path: Path) -> None:
    raw = folder(tmp_path, {"x.lmdb#1.png": "plain", "my.tar#dir/2.png": "two", "f.png": "f"})
    tar(raw / "my.tar", {"dir/2.png": b"hidden by the file", "3.png": b"three"})
    tar(raw / "odd#name.bin", {"a#b.png": b"by its content"})
    media = MediaReader(raw)
    assert media.read("x.lmdb#1.png") == b"plain"
    assert media.read("my.tar#dir/2.png") == b"two"
    assert media.read("my.tar#3.png") == b"three"
    assert media.read("odd#name.bin#a#b.png") == b"by its content"
    assert refused(media, "f.png#1") == "file not found"
    assert refused(media, "#" * 5000).startswith("OSError")
    media.close()
