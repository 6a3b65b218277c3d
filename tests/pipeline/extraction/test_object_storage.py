"""Raw files in object storage give the dataset and the features of the same files in a folder."""

import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features import object_storage
from features.errors import UserError
from features.store import FeatureStore
from features.warehouse import Warehouse
from pipeline.datasets.prepare import PrepareOptions, prepare_dataset
from pipeline.extraction.job import extract_features
from pipeline.extraction.options import ExtractOptions
from pipeline.extraction.ray_engine import EncodeWorker, WorkerConfig, hash_shard, make_shards
from pipeline.extraction.tasks import EncodeOptions
from pipeline.media.raw_storage import RawStorage, raw_folder
from tests.object_store import BUCKET, LocalStorage
from tests.pipeline.backbones.tiny import picture
from tests.pipeline.media.videos import write_video

OPTIONS = ExtractOptions(image="hashed", text="hashed", video="hashed", batch_size=4)
N = 8


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Raw files: images in a folder and in a tar, a video, a damaged and a missing image."""
    raw = tmp_path / "raw"
    images = [f"images/{n}.png" for n in range(N)]
    for n, name in enumerate(images):
        picture(raw / name, n)
    (raw / "images" / "1.png").write_bytes(b"no image")
    (raw / "images" / "2.png").write_bytes(b"")
    images[3] = "images/missing.png"
    with tarfile.open(raw / "more.tar", "w") as tar:
        tar.add(picture(tmp_path / "4.png", 40), "4.png")
    images[4] = "more.tar#4.png"
    write_video(raw / "videos" / "v.mkv", frames=75, gop=10, noise=9)
    rows = [f"i{n},Title {n},{name},{'videos/v.mkv' if n == 5 else ''}"
            for n, name in enumerate(images)]  # fmt: skip
    (raw / "items.csv").write_text("\n".join(["item_id,text,image,video", *rows]) + "\n")
    clicks = [f"u{user},i{item},{item}" for user in range(3) for item in range(N)]
    (raw / "interactions.csv").write_text("\n".join(["user_id,item_id,timestamp", *clicks]) + "\n")
    return raw


def prepare(root: Path, raw: Path | str) -> Warehouse:
    warehouse = Warehouse(root)
    prepare_dataset(warehouse, PrepareOptions(dataset="shop", format="table", raw=raw))
    return warehouse


def rows(warehouse: Warehouse) -> dict[str, pa.Table]:
    """Return the rows of every feature table, and those of the items."""
    tables = FeatureStore(warehouse).tables("shop")
    parts = {table.label: table.parts() for table in tables}
    parts["items"] = list((warehouse.dataset_dir("shop") / "items").glob("*.parquet"))
    return {
        label: pa.concat_tables([pq.read_table(path) for path in paths])
        .sort_by("item")
        .replace_schema_metadata(None)
        for label, paths in parts.items()
    }


def local_files(warehouse: Warehouse) -> list[str]:
    """Return the files of the raw folder on this machine that are not hidden."""
    root = warehouse.root / "raw"
    return sorted(path.name for path in root.rglob("*") if path.is_file() and path.name[0] != ".")


def test_the_tables_and_the_failures_are_those_of_a_folder(
    raw: Path, storage: LocalStorage, tmp_path: Path
) -> None:
    storage.put_folder(raw, "first")
    here = prepare(tmp_path / "here", raw)
    there = prepare(tmp_path / "there", f"s3://{BUCKET}/first/")
    assert there.info("shop").raw == f"s3://{BUCKET}/first"
    assert there.info("shop").fingerprint == here.info("shop").fingerprint
    assert local_files(there) == ["interactions.csv", "items.csv", "more.tar"]

    local, stored = (extract_features(root, "shop", OPTIONS) for root in (here, there))
    for ours, theirs in zip(local.tables, stored.tables, strict=True):
        assert (ours.encoded, ours.failed) == (theirs.encoded, theirs.failed)
    assert stored.tables[0].failed == {"not an image in a known format": 1, "empty file": 1}
    expected = rows(here)
    assert rows(there).keys() == expected.keys()
    for label, table in rows(there).items():
        assert table.equals(expected[label]), label

    storage.put("first/images/5.png", picture(tmp_path / "new.png", 99).read_bytes())
    again = extract_features(there, "shop", OPTIONS).tables
    assert [table.encoded for table in again] == [1, 0, 0]


def test_a_second_preparation_brings_what_has_changed(
    raw: Path, storage: LocalStorage, tmp_path: Path
) -> None:
    storage.put_folder(raw, "second")
    warehouse = prepare(tmp_path / "there", f"s3://{BUCKET}/second")
    copies = next((warehouse.root / "raw").rglob("items.csv")).parent
    kept = os.stat(copies / "interactions.csv").st_ino
    storage.put("second/items.csv", (raw / "items.csv").read_bytes() + b"i9,New,,\n")
    storage.delete("second/more.tar")
    info = prepare_dataset(warehouse, PrepareOptions(dataset="shop"))  # the folder is remembered
    assert info.items == N + 1
    assert local_files(warehouse) == ["interactions.csv", "items.csv"]
    assert os.stat(copies / "interactions.csv").st_ino == kept


def test_a_worker_on_another_machine_reads_the_storage_itself(
    raw: Path, storage: LocalStorage, tmp_path: Path
) -> None:
    storage.put_folder(raw, "ray")
    folder = raw_folder(Warehouse(tmp_path / "other machine"), f"s3://{BUCKET}/ray")
    assert isinstance(folder, RawStorage)
    config = WorkerConfig(
        backbone_name="hashed", device=None, compute="float32", raw=folder.resolve(),
        prepared=tmp_path, options=EncodeOptions(modality="image", batch_size=4, threads=2),
    )  # fmt: skip
    (shard,) = make_shards({0: "images/0.png", 1: "more.tar#4.png"}, 9)
    contents = [row["content"] for row in hash_shard(shard, config).to_pylist()]
    encoded = EncodeWorker(config)(shard).to_pylist()
    assert [row["content"] for row in encoded] == contents
    assert all(row["vector"] for row in encoded)


def test_a_storage_that_cannot_be_read_ends_the_command_in_one_line(
    raw: Path, storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.put_folder(raw, "dead")
    warehouse = prepare(tmp_path / "there", f"s3://{BUCKET}/dead")
    with pytest.raises(UserError, match=rf"s3://{BUCKET}/none holds no object; correct the URL"):
        prepare(tmp_path / "there", f"s3://{BUCKET}/none")
    storage.put("bad/interactions.csv", b"a,b\n1,2\n")
    with pytest.raises(UserError, match=rf"s3://{BUCKET}/bad/?.*user"):
        prepare(tmp_path / "there", f"s3://{BUCKET}/bad")
    with pytest.raises(UserError, match="the bucket of s3://nowhere/raw does not exist"):
        prepare(tmp_path / "there", "s3://nowhere/raw")
    monkeypatch.setattr(object_storage, "CONNECT_SECONDS", 0.2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=rf"s3://{BUCKET}/dead cannot be reached"):
        extract_features(warehouse, "shop", ExtractOptions(image="hashed"))
    assert not FeatureStore(warehouse).table("shop", "hashed", "image").parts()


def test_names_of_objects_cannot_leave_the_copies(
    raw: Path, storage: LocalStorage, tmp_path: Path
) -> None:
    storage.put_folder(raw, "names")
    for name in ("../outside.csv", "a//b.csv", "./c.csv", "/d.csv"):
        storage.put(f"names/{name}", b"x")
    notes: list[str] = []
    warehouse = Warehouse(tmp_path / "there")
    options = PrepareOptions(dataset="shop", format="table", raw=f"s3://{BUCKET}/names")
    prepare_dataset(warehouse, options, notify=notes.append)
    assert any("objects left out whose names are no paths of files" in note for note in notes)
    assert local_files(warehouse) == ["interactions.csv", "items.csv", "more.tar"]
    assert not list(tmp_path.rglob("outside.csv"))
