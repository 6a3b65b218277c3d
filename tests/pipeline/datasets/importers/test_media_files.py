"""Images and videos of items: in folders, tars, LMDBs and as bytes in the table of items."""

import io
import os
import tarfile
import unicodedata
from pathlib import Path

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.errors import UserError
from features.store import FeatureStore
from features.warehouse import Warehouse
from pipeline.datasets.importers import image_column
from pipeline.datasets.importers.reference_columns import ROLES
from pipeline.datasets.prepare import PrepareOptions, prepare_dataset
from pipeline.extraction.job import extract_features
from pipeline.extraction.options import ExtractOptions
from pipeline.media.reader import MediaReader
from tests.pipeline.backbones import tiny
from tests.pipeline.datasets.raws import INTERACTIONS, ITEMS, folder, items_of, prepared
from tests.pipeline.media.containers import image_bytes, tar, write_lmdb


def images_of(warehouse: Warehouse) -> list[str | None]:
    return [row["image"] for row in items_of(warehouse)]


# -- references -----------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["image", "video"])
def test_references_outside_the_raw_folder_are_absent_for_their_items_only(
    tmp_path: Path, warehouse: Warehouse, column: str
) -> None:
    (tmp_path / "secret.png").write_bytes(image_bytes(0))
    raw = tmp_path / "raw"
    outside = (
        "../secret.png", "a/../../secret.png", "/etc/passwd", "outside:/etc/passwd",
        "prepared:media/images.tar#1", "../raw2/secret.png", "../images.tar#1.png", "..",
        "file:///etc/passwd", f"file://{raw}/../x.png", " /etc/x",
    )  # fmt: skip
    rows = [f"{number:02d},{reference}" for number, reference in enumerate(outside)]
    content = {
        "interactions.csv": "user_id,item_id\nu,00\n",
        "items.csv": "\n".join(
            [f"item_id,{column}", *rows, f"97,{raw}/ok.png", "98,", "99,ok.png"]
        ),
        "ok.png": "x",
    }
    notes: list[str] = []
    prepared(warehouse, raw, dict(content), notify=notes.append)
    expected = [*[None] * len(outside), "ok.png", None, "ok.png"]
    assert [row[column] for row in items_of(warehouse)] == expected
    (note,) = [note for note in notes if "outside" in note]
    assert note.startswith(f"{len(outside)} items whose {column}")
    assert ", ".join(map(repr, outside[:3])) in note
    assert repr(outside[3]) not in note
    assert f"--file {ROLES[column]}=PATH" in note


def test_paths_that_return_to_the_folder_and_links_are_accepted(
    warehouse: Warehouse, tmp_path: Path
) -> None:
    folder(tmp_path / "disk", {"a.png": "A", "b.png": "B", "deep/c.png": "C"})
    real = folder(tmp_path / "real", {"interactions.csv": INTERACTIONS})
    (real / "items.csv").write_text(f"item_id,image\na,x/../link/a.png\nb,{real}/link/b.png\nc,\n")
    (real / "link").symlink_to(tmp_path / "disk")
    (real / "images").mkdir()
    (real / "images" / "more").symlink_to(tmp_path / "disk" / "deep")
    (real / "images" / "again").symlink_to(real / "images")  # an endless path
    raw = tmp_path / "raw"
    raw.symlink_to(real)
    info = prepared(warehouse, raw, {})
    assert images_of(warehouse) == ["link/a.png", "link/b.png", "images/more/c.png"]
    media = MediaReader(Path(info.raw))
    assert [media.read(str(reference)) for reference in images_of(warehouse)] == [b"A", b"B", b"C"]


def test_a_reference_in_the_table_of_items_wins(warehouse: Warehouse, tmp_path: Path) -> None:
    notes: list[str] = []
    items = "item_id,image\na,./images/a.png\nb,other/b.png\nc,\n"
    files = {f"{name}.png": "x" for name in ("images/a", "images/b", "images/c", "other/b")}
    content = {"interactions.csv": INTERACTIONS, "items.csv": items, **files}
    prepared(warehouse, tmp_path / "raw", content, notify=notes.append)
    assert images_of(warehouse) == ["images/a.png", "other/b.png", "images/c.png"]
    (note,) = [note for note in notes if "'b'" in note]
    assert note.startswith("1 item with images both in the table of items and among the files")


def test_the_first_of_several_files_of_an_item_by_name_wins(
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


@pytest.mark.parametrize("role", ["images", "videos"])
def test_a_file_that_cannot_hold_media(warehouse: Warehouse, tmp_path: Path, role: str) -> None:
    content: dict[str, str | bytes] = {
        "interactions.csv": INTERACTIONS, "items.csv": ITEMS, "all.zip": "PK",
    }  # fmt: skip
    with pytest.raises(UserError, match=r"all.zip is not a folder[^\n]*"):
        prepared(warehouse, tmp_path / "raw", content, files={role: "all.zip"})


# -- tars -----------------------------------------------------------------------------------


def test_images_in_a_tar_from_raw_to_vectors(warehouse: Warehouse, tmp_path: Path) -> None:
    raw = folder(tmp_path / "raw", {"interactions.csv": INTERACTIONS})
    (raw / "items.csv").write_text("item_id,image\na,\nb,more.tar#deep/file.png\nc,\n")
    hostile = {
        "../../etc/a.png": image_bytes(1),
        ".hidden/c.png": b"",
        "x/._c.png": b"",
        "c.txt": b"",
    }
    tar(raw / "images.tar", {"z/a.png": image_bytes(9), **hostile, "/abs/c.png": image_bytes(3)})
    tar(raw / "more.tar", {"deep/file.png": image_bytes(2)})
    info = prepared(warehouse, raw, {})
    assert images_of(warehouse) == [
        "images.tar#z/a.png", "more.tar#deep/file.png", "images.tar#/abs/c.png",
    ]  # fmt: skip
    report = extract_features(warehouse, "mine", ExtractOptions(image="hashed")).tables[0]
    assert (report.encoded, report.failed) == (3, {})
    vectors = vectors_of(warehouse, info.inputs)
    plain = folder(tmp_path / "plain", {f"{i}.png": image_bytes(i) for i in (9, 2, 3)})
    same = tiny.prepare(
        warehouse, plain, ids=list("abc"), image=["9.png", "2.png", "3.png"], name="plain"
    )
    extract_features(warehouse, "plain", ExtractOptions(image="hashed"))
    assert (vectors == vectors_of(warehouse, same.inputs, "plain")).all()


def test_a_tar_elsewhere_by_option(warehouse: Warehouse, tmp_path: Path) -> None:
    tar(tmp_path / "disk" / "covers.tar", {"a.png": image_bytes(1)})
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
        put.put(b"a", image_bytes(1))
    content: dict[str, str | bytes] = {"interactions.csv": INTERACTIONS, "items.csv": ITEMS}
    prepared(warehouse, tmp_path / "raw", content, files={"images": "store"})
    assert images_of(warehouse) == ["store#a", None, None]
    assert (
        extract_features(warehouse, "mine", ExtractOptions(image="hashed")).tables[0].encoded == 1
    )


# -- bytes in the table of items ------------------------------------------------------------


def write_items(raw: Path, values: pa.Array, ids: list[str], **options: int) -> None:
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
    raw = folder(tmp_path / "raw", {"interactions.csv": clicks, "more/e.png": image_bytes(5)})
    ids = ["f", "gone", "a", "c", "b", "e", "d"]  # neither in order of ids nor all of them kept
    data: list[bytes | None] = [
        image_bytes(1),
        image_bytes(2),
        None,
        image_bytes(3),
        b"",
        None,
        image_bytes(3),
    ]
    if kind == "bytes":
        values = pa.array(data, pa.binary())
        data[5] = None
    else:
        names = ["bytes", "path"] if kind == "struct" else ["path", "bytes"]
        path = [None, "2.png", None, "3.png", None, "more/e.png", None]
        field = {"bytes": pa.array(data, pa.binary()), "path": pa.array(path)}
        values = pa.StructArray.from_arrays([field[name] for name in names], names)
    write_items(raw, values, ids, row_group_size=3)
    info = prepared(warehouse, raw, {}, k_core=1)
    images = images_of(warehouse)
    assert [image.split("#")[0] if image else None for image in images] == [
        None,
        *["prepared:media/images.tar"] * 3,
        "more/e.png" if kind != "bytes" else None,
        "prepared:media/images.tar",
    ]
    assert items_of(warehouse)[0]["attributes"] == '{"title":"a"}'
    assert images[2] == images[3] != images[5]
    media = MediaReader(raw, warehouse.dataset_dir("mine"))
    assert media.read(str(images[5])) == image_bytes(1)
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
    # Other images are other inputs; without images as bytes, the copies are removed.
    write_items(raw, pa.array([image_bytes(7)] * 7, pa.binary()), ids)
    assert prepared(warehouse, raw, {}, k_core=1).inputs["image"] != info.inputs["image"]
    write_items(raw, pa.array(["x.png"] * 7), ids)
    prepared(warehouse, raw, {}, k_core=1)
    assert not (warehouse.dataset_dir("mine") / "media").exists()


def test_paths_in_a_struct_stay_inside(warehouse: Warehouse, tmp_path: Path) -> None:
    raw = folder(tmp_path / "raw", {"interactions.csv": INTERACTIONS, "ok.png": "x"})
    rows = [{"bytes": None, "path": path} for path in ("ok.png", "../../x.png", "https://x.org/c")]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    write_items(raw, pa.array(rows, kind), ["a", "b", "c"])
    notes: list[str] = []
    prepared(warehouse, raw, {}, notify=notes.append)
    assert images_of(warehouse) == ["ok.png", None, None]
    for fault in ("outside", "URL"):
        assert any(note.startswith("1 item ") and fault in note for note in notes)


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.binary()), pa.struct([("x", pa.int32())]), pa.list_(pa.string())]
)
def test_columns_that_are_neither_references_nor_bytes(
    warehouse: Warehouse, tmp_path: Path, kind: pa.DataType
) -> None:
    raw = folder(tmp_path / "raw", {"interactions.csv": INTERACTIONS})
    write_items(raw, pa.array([None] * 3, kind), ["a", "b", "c"])
    with pytest.raises(UserError, match=r"items.parquet: the column 'Image' is of type [^\n]*;"):
        prepared(warehouse, raw, {})


def test_copying_images_takes_memory_for_a_few(
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


def test_media_lie_in_folders_by_item_id(warehouse: Warehouse, tmp_path: Path) -> None:
    content = {
        "sequences.txt": "1 a b c a.b ü\n",
        "posters/a.jpg": "x",
        "posters/c.txt": "x",
        "posters/.b.jpg": "x",
        "posters_extra/b.png": "x",
        "posters_extra/deep/a.jpg": "x",
        "posters_extra/deep/a.b.webp": "x",
        "posters_extra/ü.jpg": "x",
        "videos/c.MP4": "x",
        "videos/a.jpg": "x",
    }
    prepared(warehouse, tmp_path / "raw", content, format="sequences")
    assert {row["item_id"]: (row["image"], row["video"]) for row in items_of(warehouse)} == {
        "a": ("posters/a.jpg", None),
        "b": ("posters_extra/b.png", None),
        "c": (None, "videos/c.MP4"),
        "a.b": ("posters_extra/deep/a.b.webp", None),
        "ü": ("posters_extra/ü.jpg", None),
    }


def test_a_file_name_that_is_not_utf8_is_no_item(warehouse: Warehouse, tmp_path: Path) -> None:
    raw = folder(tmp_path / "raw", {"sequences.txt": "1 a\n", "images/a.jpg": "x"})
    try:
        (raw / "images" / b"\xff.jpg".decode("utf-8", "surrogateescape")).touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    prepare_dataset(warehouse, PrepareOptions(dataset="mine", raw=raw, format="sequences"))
    assert [row["image"] for row in items_of(warehouse)] == ["images/a.jpg"]


# -- names ----------------------------------------------------------------------------------

NFC, NFD = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))


@pytest.mark.parametrize("container", ["folder", "tar", "lmdb"])
@pytest.mark.parametrize(("item", "name"), [(NFC, NFD), (NFD, NFC), (NFC, NFC)])
def test_names_match_in_both_forms_of_unicode(
    warehouse: Warehouse, tmp_path: Path, container: str, item: str, name: str
) -> None:
    raw = folder(tmp_path / "raw", {"interactions.csv": f"user_id,item_id\nu,{item}\n"})
    (raw / "items.csv").write_text(f"item_id\n{item}\n")
    if container == "folder":
        folder(raw, {f"images/{name}.png": "x"})
    elif container == "tar":
        tar(raw / "images.tar", {f"{name}.png": b"x"})
    else:
        write_lmdb(raw / "images.lmdb", {name: b"x"}, subdir=False)
    info = prepared(warehouse, raw, {})
    (image,) = images_of(warehouse)
    assert MediaReader(Path(info.raw)).read(str(image)) == b"x"


@pytest.mark.parametrize("suffix", [".jp2", ".jpe", ".JPG", ".Png", ".heic", ".j2k"])
def test_endings_of_images(warehouse: Warehouse, tmp_path: Path, suffix: str) -> None:
    content: dict[str, str | bytes] = {"interactions.csv": INTERACTIONS, "items.csv": ITEMS}
    prepared(warehouse, tmp_path / "raw", {**content, f"images/a{suffix}": "x"})
    assert images_of(warehouse) == [f"images/a{suffix}", None, None]


@pytest.mark.parametrize(
    ("reference", "file"),
    [
        (" art/a.png ", "art/a.png"),
        ("art\\a.png", "art/a.png"),
        ("\tart\\a.png", "art/a.png"),
        ("art/a.PNG", "art/a.png"),
        ("art/a.jpg", "art/a.JPG"),
        (f"art/{NFC}.png", f"art/{NFD}.png"),
        (f"art/{NFD}.png", f"art/{NFC}.png"),
        ("{raw}/art/a.png", "art/a.png"),
        ("file://{raw}/art/a%20b.png", "art/a b.png"),
        ("FILE://localhost{raw}/art/a.png", "art/a.png"),
        ("art\\a.png", "art\\a.png"),
        (" a.png", " a.png"),
    ],
)
def test_references_find_their_file(
    warehouse: Warehouse, tmp_path: Path, reference: str, file: str
) -> None:
    raw = folder(tmp_path / "raw", {"interactions.csv": INTERACTIONS, file: "x"})
    written = reference.replace("{raw}", str(raw))
    (raw / "items.csv").write_text(f"item_id,image\na,{written}\nb,\nc,\n")
    notes: list[str] = []
    prepared(warehouse, raw, {}, notify=notes.append)
    assert images_of(warehouse) == [file, None, None]
    assert not any("absent" in note for note in notes)


@pytest.mark.parametrize("column", ["image", "video"])
def test_references_without_a_file_are_counted(
    warehouse: Warehouse, tmp_path: Path, column: str
) -> None:
    raw = folder(tmp_path / "raw", {"interactions.csv": INTERACTIONS, "b.png": "x"})
    tar(raw / "t.tar", {"in.png": b"x"})
    rows = ["a,no.png", "b,b.png", "c,t.tar#in.png", "d,t.tar#out.png", "e,x/y.png", "f,z.png"]
    (raw / "items.csv").write_text(f"item_id,{column}\n" + "\n".join(rows) + "\n")
    notes: list[str] = []
    prepared(warehouse, raw, {}, notify=notes.append)
    (note,) = [note for note in notes if "has no file" in note]
    assert note.startswith(f"4 items whose {column}")
    absent = [row["item_id"] for row in items_of(warehouse) if row[column] is None]
    assert absent == ["a", "d", "e", "f"]
    assert all(repr(name) in note for name in ("no.png", "t.tar#out.png", "x/y.png"))
    assert "z.png" not in note


def test_files_that_fit_no_item_are_counted(warehouse: Warehouse, tmp_path: Path) -> None:
    files = {f"images/{name}": "x" for name in ("a.png", "A.png", "1 .png", "b_1.png", "c_1.png")}
    notes: list[str] = []
    content: dict[str, str | bytes] = {"interactions.csv": INTERACTIONS, "items.csv": ITEMS}
    prepared(warehouse, tmp_path / "raw", {**content, **files}, notify=notes.append)
    (note,) = [note for note in notes if "fit no item" in note]
    assert note.startswith("4 of 5 files in images")
    assert "'images/1 .png', 'images/A.png', 'images/b_1.png'" in note


@pytest.mark.parametrize(("column", "role"), ROLES.items())
def test_files_that_the_table_of_items_names_fit_an_item(
    warehouse: Warehouse, tmp_path: Path, column: str, role: str
) -> None:
    suffix = {"images": "png", "videos": "mp4"}[role]
    files: dict[str, str | bytes] = {f"{role}/{name}.{suffix}": "x" for name in ("1", "2", "3")}
    rows = f"item_id,{column}\na,{role}/1.{suffix}\nb,x/../{role}/2.{suffix}\nc,\n"
    notes: list[str] = []
    content = {"interactions.csv": INTERACTIONS, "items.csv": rows} | files
    prepared(warehouse, tmp_path / "raw", content, notify=notes.append)
    (note,) = [note for note in notes if "fit no item" in note]
    assert note.startswith(f"1 of 3 files in {role}")
    assert f"'{role}/3.{suffix}'" in note


@pytest.mark.parametrize("url", ["https://x.org/a", "s3://x/a.jpg", "HTTP://x.org/a", "//x.org/a"])
def test_urls_are_named_and_files_by_item_id_are_used(
    warehouse: Warehouse, tmp_path: Path, url: str
) -> None:
    raw = folder(tmp_path / "raw", {"interactions.csv": INTERACTIONS, "images/a.png": "x"})
    (raw / "items.csv").write_text(f"item_id,image\na,{url}\nb,{url}?b\nc,\n")
    notes: list[str] = []
    prepared(warehouse, raw, {}, notify=notes.append)
    assert images_of(warehouse) == ["images/a.png", None, None]
    (note,) = [note for note in notes if "URL" in note]
    assert note.startswith("2 items")
    assert url in note
    assert "download" in note


def test_links_in_folders_and_tars(warehouse: Warehouse, tmp_path: Path) -> None:
    raw = folder(tmp_path / "raw", {"interactions.csv": INTERACTIONS, "items.csv": ITEMS})
    folder(raw, {"images/a.png": "x"})
    os.link(raw / "images" / "a.png", raw / "images" / "b.png")
    (raw / "images" / "c.png").symlink_to("b.png")
    os.unlink(raw / "images" / "b.png")
    notes: list[str] = []
    prepared(warehouse, raw, {}, notify=notes.append)
    assert images_of(warehouse) == ["images/a.png", None, None]
    assert any("1 link in images without a file" in note and "c.png" in note for note in notes)
    os.link(raw / "images" / "a.png", raw / "images" / "b.png")
    prepared(warehouse, raw, {})
    assert images_of(warehouse) == ["images/a.png", "images/b.png", "images/c.png"]
    with tarfile.open(raw / "linked.tar", "w") as into:
        into.add(raw / "images", "deep")  # tarfile writes b.png as a hard link
    prepared(warehouse, raw, {}, files={"images": "linked.tar"})
    images = images_of(warehouse)
    assert images == [f"linked.tar#deep/{name}.png" for name in "abc"]
    media = MediaReader(raw)
    assert [media.read(str(image)) for image in images] == [b"x"] * 3
    media.close()


@pytest.mark.parametrize("container", ["folder", "tar"])
@pytest.mark.parametrize("name", ["a", "a.img", "a.jpg_large", "deep/a."])
def test_a_file_of_an_item_with_an_unknown_ending_is_named(
    warehouse: Warehouse, tmp_path: Path, container: str, name: str
) -> None:
    files = {name: b"x", "b.png": b"x", "b.txt": b"x", "readme.txt": b"x", "c.mp4": b"x"}
    raw = folder(tmp_path / "raw", {"interactions.csv": INTERACTIONS, "items.csv": ITEMS})
    if container == "tar":
        tar(raw / "images.tar", files)
    else:
        folder(raw, {f"images/{file}": content for file, content in files.items()})
    notes: list[str] = []
    prepared(warehouse, raw, {}, notify=notes.append)
    (note,) = [note for note in notes if "ending" in note]
    assert note.startswith("1 item with a file in images")
    assert name in note
    assert "rename" in note
    assert "b.txt" not in note


def test_an_lmdb_whose_images_are_in_a_named_table_is_refused(
    warehouse: Warehouse, tmp_path: Path
) -> None:
    raw = folder(tmp_path / "raw", {"interactions.csv": INTERACTIONS, "items.csv": ITEMS})
    with lmdb.open(str(raw / "images.lmdb"), max_dbs=1) as file:
        table = file.open_db(b"covers")
        with file.begin(write=True) as write:
            write.put(b"a", b"x", db=table)
    with pytest.raises(UserError, match=r"images.lmdb: b'covers' names a table.*main table"):
        prepared(warehouse, raw, {})


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize(
    "targets",
    [("gone.png",), ("/etc/passwd",), ("../../b.png",), ("d.png", "c.png"), ("c.png",)],
)
def test_links_in_tars_that_lead_to_no_file_are_counted(
    warehouse: Warehouse, tmp_path: Path, kind: bytes, targets: tuple[str, ...]
) -> None:
    raw = folder(tmp_path / "raw", {"interactions.csv": INTERACTIONS, "items.csv": ITEMS})
    with tarfile.open(raw / "images.tar", "w") as into:
        for name, target in zip(("c.png", "d.png"), targets, strict=False):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            into.addfile(member)
        for name, link_kind, target in (("b.png", kind, "a.png"), ("notes.txt", kind, "gone")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = link_kind, target
            into.addfile(member)
        member = tarfile.TarInfo("a.png")
        member.size = 1
        into.addfile(member, io.BytesIO(b"a"))
    notes: list[str] = []
    prepared(warehouse, raw, {}, notify=notes.append)
    (note,) = (note for note in notes if "without a file" in note)
    assert note.startswith(f"{len(targets)} link")
    assert "images.tar#c.png" in note
    assert images_of(warehouse)[:2] == ["images.tar#a.png", "images.tar#b.png"]
