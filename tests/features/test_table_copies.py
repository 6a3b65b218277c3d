"""Copies of feature tables in object storage are complete or absent, and checked."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from features.errors import UserError
from features.object_storage import StorageFolder
from features.store import FeatureStore, FeatureTable
from features.table_copies import choose_tables, pull_table, push_table, stored_tables
from features.warehouse import DatasetInfo, Warehouse
from tests.features.test_store import MADE, numbers, rows
from tests.object_store import BUCKET, LocalStorage
from tests.pipeline.backbones.tiny import prepare

ITEMS = 6


@pytest.fixture
def folder(storage: LocalStorage, tmp_path: Path) -> StorageFolder:
    """A prefix of its own for each test."""
    return StorageFolder(f"s3://{BUCKET}/{tmp_path.name}")


@pytest.fixture
def info(warehouse: Warehouse, tmp_path: Path) -> DatasetInfo:
    return prepare(warehouse, tmp_path, ids=[f"id{n}" for n in range(ITEMS)])


@pytest.fixture
def table(warehouse: Warehouse, info: DatasetInfo) -> FeatureTable:
    """A finished table of three parts."""
    table = FeatureStore(warehouse).table("tiny", "toy", "image")
    write(table, info, seed=0)
    return table


def write(table: FeatureTable, info: DatasetInfo, *, seed: int, first: int = 0) -> None:
    """Write the parts of a table again, from a given one on, and finish it."""
    vectors = numbers(ITEMS, seed=seed)
    for part in table.parts()[first:]:
        part.unlink()
    for number in range(first, 3):
        items = [2 * number, 2 * number + 1]
        table.append(rows(items, vectors[items]), MADE)
    table.finish(info.fingerprint, MADE, inputs=info.inputs_of("image"))


def contents(table: FeatureTable) -> dict[str, bytes]:
    """Return the bytes of the parts and of the manifest by name."""
    files = [*table.parts(), table.manifest_path]
    return {path.name: path.read_bytes() for path in files if path.exists()}


def forget(table: FeatureTable) -> None:
    shutil.rmtree(table.path.parent)


def test_a_table_comes_back_as_it_was(
    table: FeatureTable, info: DatasetInfo, folder: StorageFolder
) -> None:
    before = contents(table)
    pushed = push_table(table, info, folder)
    assert (pushed.table, pushed.parts, pushed.copied) == ("image=toy", 3, 3)
    assert push_table(table, info, folder).copied == 0
    forget(table)
    assert pull_table(table, info, folder).copied == 3
    assert contents(table) == before
    assert table.read(ITEMS, info.fingerprint, info.inputs_of("image")).present.all()
    assert pull_table(table, info, folder).copied == 0
    assert sorted(path.name for path in table.path.iterdir()) == sorted([
        ".lock", *(name for name in before if name.endswith(".parquet"))
    ])  # fmt: skip


def test_the_earlier_copy_is_complete_until_the_new_one_is(
    table: FeatureTable,
    info: DatasetInfo,
    folder: StorageFolder,
    storage: LocalStorage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = contents(table)
    push_table(table, info, folder)
    write(table, info, seed=1, first=1)
    uploads = []

    def fail_at_the_second(self: StorageFolder, path: Path, name: str) -> None:
        uploads.append(name)
        if len(uploads) == 2:
            raise UserError("the network is gone")
        upload(self, path, name)

    upload = StorageFolder.upload
    with monkeypatch.context() as patch:
        patch.setattr(StorageFolder, "upload", fail_at_the_second)
        with pytest.raises(UserError, match="the network is gone"):
            push_table(table, info, folder)
    after = contents(table)
    forget(table)
    pull_table(table, info, folder)
    assert contents(table) == before
    assert len([key for key in storage.names() if folder.prefix in key]) == 5  # with one leftover

    write(table, info, seed=1, first=1)
    assert push_table(table, info, folder).copied == 1  # the first part and the leftover are there
    assert len([key for key in storage.names() if folder.prefix in key]) == 4
    forget(table)
    pull_table(table, info, folder)
    assert contents(table) == after


def test_an_interrupted_pull_leaves_no_table_and_goes_on(
    table: FeatureTable,
    info: DatasetInfo,
    folder: StorageFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = contents(table)
    push_table(table, info, folder)
    forget(table)

    def stop_in_the_last(self: StorageFolder, name: str, path: Path) -> None:
        download(self, name, path)
        if name.startswith("part-00002"):
            path.write_bytes(path.read_bytes()[:100])
            raise KeyboardInterrupt

    download = StorageFolder.download
    with monkeypatch.context() as patch:
        patch.setattr(StorageFolder, "download", stop_in_the_last)
        with pytest.raises(KeyboardInterrupt):
            pull_table(table, info, folder)
    assert contents(table) == {}
    with pytest.raises(UserError, match="does not exist"):
        table.check(info.fingerprint, info.inputs_of("image"))
    assert pull_table(table, info, folder).copied == 1
    assert contents(table) == before


def test_changed_bytes_and_lost_parts_are_one_line(
    table: FeatureTable, info: DatasetInfo, folder: StorageFolder, storage: LocalStorage
) -> None:
    push_table(table, info, folder)
    forget(table)
    key = next(key for key in storage.names() if folder.prefix in key and "part-00001" in key)
    data = storage.get(key)
    middle = len(data) // 2
    storage.put(key, data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    with pytest.raises(UserError, match=r"the bytes of s3://.*part-00001.* have changed; push"):
        pull_table(table, info, folder)
    assert contents(table) == {}
    storage.delete(key)
    with pytest.raises(UserError, match=r"lacks part-00001-\w+\.parquet; push"):
        pull_table(table, info, folder)
    assert contents(table) == {}


def test_another_table_is_replaced_only_if_that_is_asked_for(
    table: FeatureTable, info: DatasetInfo, folder: StorageFolder
) -> None:
    pushed = contents(table)
    push_table(table, info, folder)
    table.clear()
    write(table, info, seed=5)
    other = contents(table)
    with pytest.raises(UserError, match=r"holds other vectors than s3://.*; replace it by --over"):
        pull_table(table, info, folder)
    assert contents(table) == other
    pull_table(table, info, folder, overwrite=True)
    assert contents(table) == pushed


def test_what_cannot_be_copied_is_one_line(
    table: FeatureTable, info: DatasetInfo, folder: StorageFolder, warehouse: Warehouse
) -> None:
    with pytest.raises(UserError, match=r"no finished copy of the feature table image=toy"):
        pull_table(table, info, folder)
    push_table(table, info, folder)
    other = replace(info, fingerprint="other")
    with pytest.raises(UserError, match="belongs to another preparation of tiny; prepare the same"):
        pull_table(table, other, folder)
    store = FeatureStore(warehouse)
    stored = stored_tables(store, "tiny", folder)
    assert stored == [table]
    assert choose_tables(stored, [], "here") == choose_tables(stored, ["image=Toy"], "here")
    with pytest.raises(UserError, match="'text=toy'; known: image=toy"):
        choose_tables(stored, ["text=toy"], "here")
    with pytest.raises(UserError, match="here has no finished feature table"):
        choose_tables([], [], "here")
    table.unfinish()
    with pytest.raises(UserError, match="is unfinished"):
        push_table(table, info, folder)
