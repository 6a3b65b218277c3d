"""Tests of checksums: a changed byte is refused, or a copy is made again."""

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features import checksums
from features.atomic_files import read_table, write_table
from features.checksums import EMPTY_CHECKSUM, ChangedBytesError, seal, verify
from features.documents import read_json, read_toml, write_json, write_toml
from features.errors import UserError


def write_parquet(path: Path) -> None:
    write_table(path, pa.table({"a": np.arange(20_000)}), compression="none")


def write_array(path: Path) -> None:
    np.save(path, np.arange(50_000))
    with path.open("ab") as stream:
        stream.write(EMPTY_CHECKSUM.encode())
    seal(path)


WRITERS: dict[str, Callable[[Path], None]] = {
    "a.parquet": write_parquet,
    "a.npy": write_array,
    "a.json": lambda path: write_json(path, {"number": 12345, "text": "x"}),
    "a.toml": lambda path: write_toml(path, {"run": {"number": 12345}}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_changed_byte_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    assert verify(path)
    data = path.read_bytes()
    mark = data.index(EMPTY_CHECKSUM.split(":")[0].encode())
    places = [
        *np.linspace(0, len(data) - 1, 60).astype(int).tolist(),
        *range(mark, mark + len(EMPTY_CHECKSUM)),
    ]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(ChangedBytesError, match=f"{name} have changed"):
            verify(path)


@pytest.mark.parametrize("name", ["a.json", "a.toml"])
def test_a_document_that_is_cut_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    data = path.read_bytes()
    for size in range(1, len(data)):
        path.write_bytes(data[:size])
        with suppress(UserError):
            document = read_json(path, "x") if name == "a.json" else read_toml(path, "x")
            assert not document  # nothing is left but the beginning of the first comment


def test_a_forked_process_verifies_for_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path)
    assert verify(path)
    assert checksums._verified
    pid = os.fork()
    if not pid:
        os._exit(len(checksums._verified))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("name", WRITERS)
def test_copies_and_new_times_are_no_change(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    copy = tmp_path / "elsewhere" / f"b{path.suffix}"
    copy.parent.mkdir()
    shutil.copyfile(path, copy)
    assert verify(copy)


def test_a_text_like_a_checksum_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    document = {"raw": f"/data/{EMPTY_CHECKSUM[:-1]}1", "last": EMPTY_CHECKSUM}
    write_json(path, document)
    assert {key: read_json(path, "again")[key] for key in document} == document


def test_files_of_other_programs_are_not_verified(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": [1]}), path)
    assert not verify(path)
    assert read_table(path)["a"].to_pylist() == [1]


@pytest.mark.parametrize(
    ("name", "read", "place"),
    [("a.json", read_json, "entry checksum"), ("a.toml", read_toml, "first line")],
)
def test_an_edited_document_names_what_to_do(
    tmp_path: Path, name: str, read: Callable[[Path, str], Any], place: str
) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    path.write_text(path.read_text().replace("12345", "12346"))
    with pytest.raises(UserError, match=f"{name} is damaged .*make it again.*{place}"):
        read(path, "make it again")
    lines = [line for line in path.read_text().splitlines() if "mmrec-crc32" not in line]
    path.write_text("\n".join(lines))
    assert "12346" in str(read(path, "make it again"))


def test_a_file_without_a_place_for_the_checksum_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(1000))
    with pytest.raises(ValueError, match="no place"):
        seal(path)


def test_a_large_file_that_the_disk_refuses_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "_LARGE_FILE", 1)
    path = tmp_path / "a.parquet"
    write_parquet(path)
    assert verify(path)
    before = path.read_bytes()

    errors = [OSError(errno.ENOSPC, "No space left on device")]

    def refuse_once(_handle: int) -> None:
        if errors:  # Linux reports an error once
            raise errors.pop()

    monkeypatch.setattr(os, "fsync", refuse_once)
    with pytest.raises(OSError, match="No space left"):
        write_table(path, pa.table({"a": np.arange(30_000)}), compression="none")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
