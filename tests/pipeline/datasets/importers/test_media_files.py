"""Where pictures and clips may be, and in what."""

import io
import os
import tarfile
import threading
from pathlib import Path

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from features.errors import UserError
from features.store import FeatureStore
from features.warehouse import Warehouse
from pipeline.datasets.importers import image_column
from pipeline.extraction.job import extract_features
from pipeline.extraction.options import ExtractOptions
from pipeline.media.errors import MediaError
from pipeline.media.reader import MediaReader
from pipeline.media.tar import MissingMemberError, TarImages
from tests.pipeline.backbones import tiny
from tests.pipeline.datasets.raws import INTERACTIONS, ITEMS, folder, items_of, prepared


def picture(seed: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.RandomState(seed).randint(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def tar(path: Path, content: dict[str, bytes], *, format: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as into:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            into.addfile(member, io.BytesIO(data))
    return path


def images_of(warehouse: Warehouse) -> list[str | None]:
    return [row["image"] for row in items_of(warehouse)]


def refused(media: MediaReader, reference: str) -> str:
    with pytest.raises(MediaError) as caught:
        media.read(reference)
    assert "\n" not in caught.value.reason
    return caught.value.reason


# -- references -----------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["image", "video"])
@pytest.mark.parametrize(
    "reference",
    [
        "../secret.png", "a/../../secret.png", "/etc/passwd", "outside:/etc/passwd",
        "prepared:media/images.tar#1", "../raw2/secret.png", "../images.tar#1.png", "..",
    ],
)  # fmt: skip
def test_what_leads_outside_is_refused_at_prepare(
    tmp_path: Path, warehouse: Warehouse, column: str, reference: str
) -> None:
    (tmp_path / "secret.png").write_bytes(picture(0))
    raw = tmp_path / "raw"
    content = {
        "interactions.csv": INTERACTIONS,
        "items.csv": f"item_id,{column}\na,ok.png\nb,{reference}\nc,\n",
    }
    with pytest.raises(UserError) as caught:
        prepared(warehouse, raw, dict(content))
    role = {"image": "images", "video": "videos"}[column]
    message = str(caught.value)
    assert message.startswith(f"{raw / 'items.csv'}: the {column} {reference!r} of item 'b'")
    assert f"--file {role}=PATH" in message


def test_what_leads_outside_is_never_read(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(picture(0))
    tar(tmp_path / "secret.tar", {"1.png": picture(0)})
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


def test_ways_that_come_back_and_links_are_fine(warehouse: Warehouse, tmp_path: Path) -> None:
    folder(tmp_path / "disk", {"a.png": "A", "b.png": "B", "deep/c.png": "C"})
    real = folder(tmp_path / "real", {"interactions.csv": INTERACTIONS})
    (real / "items.csv").write_text(f"item_id,image\na,x/../link/a.png\nb,{real}/link/b.png\nc,\n")
    (real / "link").symlink_to(tmp_path / "disk")
    (real / "images").mkdir()
    (real / "images" / "more").symlink_to(tmp_path / "disk" / "deep")
    (real / "images" / "again").symlink_to(real / "images")  # a way that never ends
    raw = tmp_path / "raw"
    raw.symlink_to(real)
    info = prepared(warehouse, raw, {})
    assert images_of(warehouse) == ["link/a.png", "link/b.png", "images/more/c.png"]
    media = MediaReader(Path(info.raw))
    assert [media.read(str(one)) for one in images_of(warehouse)] == [b"A", b"B", b"C"]


def test_what_the_table_of_items_names_wins_and_is_told(
    warehouse: Warehouse, tmp_path: Path
) -> None:
    notes: list[str] = []
    items = "item_id,image\na,./images/a.png\nb,other/b.png\nc,\n"
    files = {f"images/{name}.png": "x" for name in "abc"}
    content = {"interactions.csv": INTERACTIONS, "items.csv": items, **files}
    prepared(warehouse, tmp_path / "raw", content, notify=notes.append)
    assert images_of(warehouse) == ["images/a.png", "other/b.png", "images/c.png"]
    (note,) = [note for note in notes if "'b'" in note]
    assert note.startswith("1 item with images both in the table of items and among the files")


def test_of_several_files_of_one_item_the_first_by_name_counts(
    warehouse: Warehouse, tmp_path: Path
) -> None:
    files: dict[str, str | bytes] = {
        f"images/{name}": "x"
        for name in (
            "a.png", "a.jpg", ".b.jpg", ".hidden/b.png", "b.jpg/c.webp", "c.gif", "c", 
            "unlisted.gif", "unlisted.png",
        )
    }  # fmt: skip
    notes: list[str] = []
    content = {"interactions.csv": INTERACTIONS, "items.csv": ITEMS, **files}
    prepared(warehouse, tmp_path / "raw", content, notify=notes.append)
    assert images_of(warehouse) == ["images/a.jpg", None, "images/c.gif"]
    assert notes[0].startswith("2 items with several images (such as 'a', 'c')")


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


@pytest.mark.parametrize("role", ["images", "videos"])
def test_what_can_hold_no_pictures(warehouse: Warehouse, tmp_path: Path, role: str) -> None:
    content: dict[str, str | bytes] = {
        "interactions.csv": INTERACTIONS, "items.csv": ITEMS, "all.zip": "PK",
    }  # fmt: skip
    with pytest.raises(UserError, match=r"all.zip is no folder[^\n]*"):
        prepared(warehouse, tmp_path / "raw", content, files={role: "all.zip"})


# -- tars -----------------------------------------------------------------------------------

LONG = "d" * 90 + "/" + "n" * 150 + ".png"


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_found_whatever_their_names(tmp_path: Path, format: int) -> None:
    content = {"a.png": b"1", "./b.png": b"22" * 600, LONG: b"3", "é/日.png": b"4", "a.png/": b""}
    with TarImages(tar(tmp_path / "a.tar", content, format=format)) as found:
        assert found.get("a.png") == b"1"
        assert found.get("b.png") == found.get("./b.png") == b"22" * 600
        assert found.get(LONG) == b"3"
        assert found.get("é/日.png") == b"4"
        for name in ("c.png", "", "b"):
            with pytest.raises(MissingMemberError):
                found.get(name)


def test_of_two_members_of_one_name_the_last_counts(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {"x": b"old", "y": b"other"})
    with tarfile.open(path, "a") as more:
        member = tarfile.TarInfo("x")
        member.size = 3
        more.addfile(member, io.BytesIO(b"new"))
    with TarImages(path) as found:
        assert (found.get("x"), found.get("y")) == (b"new", b"other")


def test_members_that_are_no_plain_files_are_not_there(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as into:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo(f"{kind!r}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            into.addfile(member)
    with TarImages(tmp_path / "a.tar") as found, pytest.raises(MissingMemberError):
        found.get(f"{tarfile.SYMTYPE!r}.png")


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


def test_pictures_in_a_tar_from_raw_to_vectors(warehouse: Warehouse, tmp_path: Path) -> None:
    raw = folder(tmp_path / "raw", {"interactions.csv": INTERACTIONS})
    (raw / "items.csv").write_text("item_id,image\na,\nb,more.tar#deep/file.png\nc,\n")
    hostile = {"../../etc/a.png": picture(1), ".hidden/c.png": b"", "x/._c.png": b"", "c.txt": b""}
    tar(raw / "images.tar", {"z/a.png": picture(9), **hostile, "/abs/c.png": picture(3)})
    tar(raw / "more.tar", {"deep/file.png": picture(2)})
    info = prepared(warehouse, raw, {})
    assert images_of(warehouse) == [
        "images.tar#z/a.png", "more.tar#deep/file.png", "images.tar#/abs/c.png",
    ]  # fmt: skip
    report = extract_features(warehouse, "mine", ExtractOptions(image="hashed")).tables[0]
    assert (report.encoded, report.failed) == (3, {})
    vectors = vectors_of(warehouse, info.inputs)
    plain = folder(tmp_path / "plain", {f"{i}.png": picture(i) for i in (9, 2, 3)})
    same = tiny.prepare(
        warehouse, plain, ids=list("abc"), image=["9.png", "2.png", "3.png"], name="plain"
    )
    extract_features(warehouse, "plain", ExtractOptions(image="hashed"))
    assert (vectors == vectors_of(warehouse, same.inputs, "plain")).all()


def test_a_tar_elsewhere_by_option(warehouse: Warehouse, tmp_path: Path) -> None:
    tar(tmp_path / "disk" / "covers.tar", {"a.png": picture(1)})
    content: dict[str, str | bytes] = {"interactions.csv": INTERACTIONS, "items.csv": ITEMS}
    place = str(tmp_path / "disk" / "covers.tar")
    prepared(warehouse, tmp_path / "raw", content, files={"images": place})
    assert images_of(warehouse) == [f"outside:{place}#a.png", None, None]
    assert (
        extract_features(warehouse, "mine", ExtractOptions(image="hashed")).tables[0].encoded == 1
    )


def vectors_of(
    warehouse: Warehouse, inputs: dict[str, str], name: str = "mine"
) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    info = warehouse.info(name)
    table = FeatureStore(warehouse).table(name, "hashed", "image")
    return np.asarray(table.read(info.items, info.fingerprint, inputs["image"]).vectors)


def test_an_lmdb_folder_by_option(warehouse: Warehouse, tmp_path: Path) -> None:
    place = tmp_path / "raw" / "store"  # a folder without the usual ending
    place.parent.mkdir()
    with lmdb.open(str(place), map_size=1 << 20) as env, env.begin(write=True) as put:
        put.put(b"a", picture(1))
    content: dict[str, str | bytes] = {"interactions.csv": INTERACTIONS, "items.csv": ITEMS}
    prepared(warehouse, tmp_path / "raw", content, files={"images": "store"})
    assert images_of(warehouse) == ["store#a", None, None]
    assert (
        extract_features(warehouse, "mine", ExtractOptions(image="hashed")).tables[0].encoded == 1
    )


# -- bytes in the table of items ------------------------------------------------------------


def blob_items(raw: Path, values: pa.Array, ids: list[str], **options: int) -> None:
    thumbnails = pa.array([b"\xff\xd8"] * len(ids))
    table = pa.table({"item_id": ids, "Image": values, "title": ids, "thumbnail": thumbnails})
    pq.write_table(table, raw / "items.parquet", **options)


@pytest.mark.parametrize("kind", ["bytes", "struct", "struct turned round"])
def test_bytes_in_the_table_from_raw_to_vectors(
    warehouse: Warehouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(image_column, "_ROWS", 2)
    monkeypatch.setattr(image_column, "_REFERENCES", 2)
    clicks = "user_id,item_id\n" + "".join(f"u,{name}\n" for name in "fedcba")
    raw = folder(tmp_path / "raw", {"interactions.csv": clicks, "more/e.png": picture(5)})
    ids = ["f", "gone", "a", "c", "b", "e", "d"]  # neither in order of ids nor all of them kept
    data: list[bytes | None] = [picture(1), picture(2), None, picture(3), b"", None, picture(3)]
    if kind == "bytes":
        values = pa.array(data, pa.binary())
        data[5] = None
    else:
        names = ["bytes", "path"] if kind == "struct" else ["path", "bytes"]
        path = [None, "2.png", None, "3.png", None, "more/e.png", None]
        field = {"bytes": pa.array(data, pa.binary()), "path": pa.array(path)}
        values = pa.StructArray.from_arrays([field[name] for name in names], names)
    blob_items(raw, values, ids, row_group_size=3)
    info = prepared(warehouse, raw, {}, k_core=1)
    found = images_of(warehouse)
    assert [one.split("#")[0] if one else None for one in found] == [
        None,
        *["prepared:media/images.tar"] * 3,
        "more/e.png" if kind != "bytes" else None,
        "prepared:media/images.tar",
    ]
    assert items_of(warehouse)[0]["attributes"] == '{"title":"a"}'
    assert found[2] == found[3] != found[5]
    media = MediaReader(raw, warehouse.dataset_dir("mine"))
    assert media.read(str(found[5])) == picture(1)
    media.close()
    with tarfile.open(warehouse.dataset_dir("mine") / "media" / "images.tar") as written:
        assert len(written.getnames()) == 4  # not the one that was filtered out
    report = extract_features(warehouse, "mine", ExtractOptions(image="hashed")).tables[0]
    assert (report.encoded, report.shared) == ((3, 1) if kind != "bytes" else (2, 1))
    assert report.failed == {"empty file": 1}
    tables = {path.name: path.read_bytes() for path in warehouse.root.rglob("*/media/*")}
    prepared(warehouse, raw, {}, k_core=1)
    assert {path.name: path.read_bytes() for path in warehouse.root.rglob("*/media/*")} == tables
    assert warehouse.info("mine").inputs == info.inputs
    # Another picture is another input, and without any the copies go.
    blob_items(raw, pa.array([picture(7)] * 7, pa.binary()), ids)
    assert prepared(warehouse, raw, {}, k_core=1).inputs["image"] != info.inputs["image"]
    blob_items(raw, pa.array(["x.png"] * 7), ids)
    prepared(warehouse, raw, {}, k_core=1)
    assert not (warehouse.dataset_dir("mine") / "media").exists()


def test_paths_in_a_struct_stay_inside(warehouse: Warehouse, tmp_path: Path) -> None:
    raw = folder(tmp_path / "raw", {"interactions.csv": INTERACTIONS})
    rows = [{"bytes": None, "path": path} for path in ("ok.png", "../../x.png", None)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    blob_items(raw, pa.array(rows, kind), ["a", "b", "c"])
    with pytest.raises(UserError) as caught:
        prepared(warehouse, raw, {})
    message = str(caught.value)
    assert message.startswith(f"{raw / 'items.parquet'}, row 2: Image '../../x.png'")
    assert "outside" in message
    assert not (warehouse.dataset_dir("mine")).exists()


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.binary()), pa.struct([("x", pa.int32())]), pa.list_(pa.string())]
)
def test_columns_that_are_neither(warehouse: Warehouse, tmp_path: Path, kind: pa.DataType) -> None:
    raw = folder(tmp_path / "raw", {"interactions.csv": INTERACTIONS})
    blob_items(raw, pa.array([None] * 3, kind), ["a", "b", "c"])
    with pytest.raises(UserError, match=r"items.parquet: the column 'Image' is of type [^\n]*;"):
        prepared(warehouse, raw, {})


def test_copying_pictures_takes_memory_for_a_few(
    warehouse: Warehouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = folder(tmp_path / "raw", {"interactions.csv": INTERACTIONS})
    data = [os.urandom(1 << 20) for _ in range(64)]
    ids = ["a", "b", "c", *(f"x{i}" for i in range(61))]
    table = pa.table({"item_id": ids, "image": data})
    pq.write_table(table, raw / "items.parquet", use_dictionary=False, write_batch_size=1)
    monkeypatch.setattr(image_column, "_ROWS", 2)
    del data, table
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    most = 0
    plain = image_column._copy_rows

    def watched(*given: object) -> object:
        nonlocal most
        for pair in plain(*given):  # type: ignore[arg-type]
            most = max(most, pool.bytes_allocated() - before)
            yield pair

    monkeypatch.setattr(image_column, "_copy_rows", watched)
    prepared(warehouse, raw, {})
    assert len(set(images_of(warehouse))) == 64
    assert most < 16 << 20  # of 64 MiB
