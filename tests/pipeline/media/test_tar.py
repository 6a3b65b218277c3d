"""Images in tars."""

import io
import os
import tarfile
import threading
from pathlib import Path

import pytest

from features.errors import UserError
from pipeline.media.errors import ContainerError
from pipeline.media.reader import MediaReader
from pipeline.media.tar import TarImages
from tests.pipeline.media.containers import refused, tar

LONG = "d" * 90 + "/" + "n" * 150 + ".png"


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_found_whatever_their_names(tmp_path: Path, format: int) -> None:
    content = {"a.png": b"1", "./b.png": b"22" * 600, LONG: b"3", "é/日.png": b"4", "a.png/": b""}
    with TarImages(tar(tmp_path / "a.tar", content, format=format)) as images:
        assert images.get("a.png") == b"1"
        assert images.get("b.png") == images.get("./b.png") == b"22" * 600
        assert images.get(LONG) == b"3"
        assert images.get("é/日.png") == b"4"
        for name in ("c.png", "", "b"):
            with pytest.raises(ContainerError, match="no member"):
                images.get(name)


def test_of_two_members_of_one_name_the_last_counts(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {"x": b"old", "y": b"other"})
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo("x")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"new"))
    with TarImages(path) as images:
        assert (images.get("x"), images.get("y")) == (b"new", b"other")


def test_members_that_are_no_plain_files_are_not_there(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as into:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo(f"{kind!r}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            into.addfile(member)
    with TarImages(tmp_path / "a.tar") as images, pytest.raises(ContainerError, match="no member"):
        images.get(f"{tarfile.SYMTYPE!r}.png")


@pytest.mark.parametrize(
    ("kind", "name", "target", "expected"),
    [
        (tarfile.LNKTYPE, "l.png", "d/a.png", b"a"),
        (tarfile.LNKTYPE, "./l.png", "./d/a.png", b"a"),
        (tarfile.SYMTYPE, "l.png", "d/a.png", b"a"),
        (tarfile.SYMTYPE, "d/l.png", "a.png", b"a"),
        (tarfile.SYMTYPE, "e/l.png", "../d/./a.png", b"a"),
        (tarfile.SYMTYPE, "l.png", "first.png", b"a"),  # a link to a link
        (tarfile.SYMTYPE, "l.png", "l.png", None),
        (tarfile.SYMTYPE, "l.png", "../../d/a.png", None),
        (tarfile.SYMTYPE, "l.png", "/etc/passwd", None),
        (tarfile.LNKTYPE, "l.png", "gone.png", None),
        (tarfile.SYMTYPE, "d/a.png", "/etc/passwd", b"a"),  # the later file replaces the link
    ],
)
def test_links_lead_to_files_of_the_tar(
    tmp_path: Path, kind: bytes, name: str, target: str, expected: bytes | None
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as into:
        for link_kind, link, to in (
            (tarfile.SYMTYPE, "first.png", "d/a.png"),
            (kind, name, target),
        ):
            member = tarfile.TarInfo(link)
            member.type, member.linkname = link_kind, to
            into.addfile(member)
        member = tarfile.TarInfo("d/a.png")
        member.size = 1
        into.addfile(member, io.BytesIO(b"a"))
    with TarImages(tmp_path / "a.tar") as images:
        if expected is None:
            with pytest.raises(ContainerError, match="no member"):
                images.get(name)
        else:
            assert images.get(name) == expected


def test_many_threads_read_one_tar(tmp_path: Path) -> None:
    content = {f"{i}.png": bytes([i]) * (5000 + i) for i in range(200)}
    tar(tmp_path / "a.tar", content)
    media, wrong = MediaReader(tmp_path), []

    def read(start: int) -> None:
        for i in range(200):
            name = f"{(start + 7 * i) % 200}.png"
            if media.read(f"a.tar#{name}") != content[name]:
                wrong.append(name)

    threads = [threading.Thread(target=read, args=(25 * i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    media.close()


def test_damaged_tars_have_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tar(tmp_path / "whole.tar", {"a": b"x" * 600, "e": b"", "b": b"y" * 5000}).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:-3000])
    (tmp_path / "no.tar").write_bytes(b"no tar" * 500)
    (tmp_path / "none.tar").touch()
    monkeypatch.setattr("pipeline.media.reader.MAX_FILE_BYTES", 4096)
    media = MediaReader(tmp_path)
    assert media.read("whole.tar#a") == b"x" * 600
    assert refused(media, "whole.tar#e") == "empty file"
    assert refused(media, "whole.tar#b") == "file larger than 0 MiB"
    monkeypatch.setattr("pipeline.media.reader.MAX_FILE_BYTES", 1 << 20)
    assert media.read("whole.tar#b") == b"y" * 5000
    os.truncate(tmp_path / "whole.tar", 3000)
    assert refused(media, "whole.tar#b") == "truncated tar"
    assert refused(media, "cut.tar#a") == "not a readable tar"
    assert refused(media, "whole.tar#z") == "no such member in the tar"
    assert refused(media, "gone.tar#z") == "file not found"
    assert refused(media, "no.tar#z") == refused(media, "none.tar#z") == "not a readable tar"
    media.close()


def test_a_header_that_lies_costs_no_memory(tmp_path: Path) -> None:
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, 1 << 33
    with (tmp_path / "a.tar").open("wb") as stream:
        stream.write(member.tobuf(tarfile.GNU_FORMAT))
        stream.truncate(1 << 34)  # a hole
    with pytest.raises(UserError, match="a header without end"):
        TarImages(tmp_path / "a.tar")
