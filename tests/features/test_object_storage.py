"""Folders in object storage: objects as they were written, and one line for each fault."""

import pickle
import socket
import sys
from pathlib import Path

import pytest

from features import object_storage
from features.errors import UserError
from features.object_storage import StorageFolder, is_storage_url
from tests.object_store import BUCKET, LocalStorage


@pytest.fixture
def folder(storage: LocalStorage) -> StorageFolder:
    return StorageFolder(f"s3://{BUCKET}/raw/")


def test_objects_are_listed_read_written_and_removed(
    folder: StorageFolder, storage: LocalStorage, tmp_path: Path
) -> None:
    names = ["a.csv", "images/é #1?.png", "images/2.png"]
    for name in names:
        storage.put(f"raw/{name}", name.encode())
    storage.put("raw/images/", b"")  # the mark of a folder
    storage.put("rawer/other.csv", b"of another folder")
    storage.put("raw/empty", b"")
    assert [item.name for item in folder.objects()] == sorted([*names, "empty"])
    assert folder.read("images/é #1?.png", 9).decode() == "images/é"
    assert folder.read("empty", 9) == b""
    again = pickle.loads(pickle.dumps(folder))
    assert again.read("a.csv", 100) == b"a.csv"
    (tmp_path / "up").write_bytes(b"x" * 100_000)
    folder.upload(tmp_path / "up", "up/1")
    folder.download("up/1", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == b"x" * 100_000
    found = folder.find("up/1")
    assert found is not None
    assert found.size == 100_000
    folder.remove(["up/1", "never"])
    assert folder.find("up/1") is None
    with pytest.raises(FileNotFoundError):
        folder.read("up/1", 9)


def test_a_listing_has_every_page(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_storage, "OBJECTS_PER_PAGE", 2)
    for number in range(5):
        storage.put(f"many/{number}", b"1")
    names = [item.name for item in StorageFolder(f"s3://{BUCKET}/many").objects()]
    assert names == list(map(str, range(5)))


def test_a_bucket_that_does_not_exist_is_one_line(storage: LocalStorage, tmp_path: Path) -> None:
    absent = StorageFolder("s3://no-such-bucket/raw")
    (tmp_path / "up").write_bytes(b"x")
    line = "the bucket of s3://no-such-bucket/raw does not exist; create it"
    with pytest.raises(UserError, match=line):
        list(absent.objects())
    with pytest.raises(UserError, match=line):
        absent.read("x", 9)
    with pytest.raises(UserError, match=line):
        absent.upload(tmp_path / "up", "x")


def test_missing_credentials_are_one_line(
    folder: StorageFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"without permission .*; set AWS_ACCESS_KEY_ID and"):
        list(folder.objects())


def test_a_network_that_is_dead_or_silent_is_one_line(
    folder: StorageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_storage, "CONNECT_SECONDS", 0.2)
    monkeypatch.setattr(object_storage, "READ_SECONDS", 0.2)
    with socket.socket() as silent:  # accepts connections, and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        with pytest.raises(UserError, match=r"raw cannot be reached .*; see to the network"):
            list(StorageFolder(folder.url).objects())
    with pytest.raises(UserError, match="cannot be reached"):  # nobody listens any more
        StorageFolder(folder.url).read("a.csv", 9)


def test_a_url_that_is_none_and_an_absent_extra_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for url in ("s3://", "s3:///prefix", "s3://shop/a//b", "s3://shop/../x", "/data", "gs://x/y"):
        with pytest.raises(UserError, match="no folder in object storage; write s3://BUCKET"):
            StorageFolder(url)
    assert is_storage_url("S3://shop")
    assert not is_storage_url("https://shop/raw")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"s3://shop needs the package s3fs, .*mmrec\[s3\]"):
        StorageFolder("s3://shop")
