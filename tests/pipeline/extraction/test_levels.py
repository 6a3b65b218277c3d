"""Token tables, joint inputs, and the options that change what is read or how."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from features import sql_views
from features.errors import UserError
from features.matrices import TokenMatrix
from features.store import FeatureStore, FeatureTable
from features.warehouse import Warehouse
from pipeline.backbones.base import InputBatch, Vectors
from pipeline.backbones.hashed import DIM, Hashed
from pipeline.backbones.registry import BACKBONES
from pipeline.extraction import table_writer
from pipeline.extraction.estimate import estimate_extraction
from pipeline.extraction.job import extract_features
from pipeline.extraction.options import ExtractOptions
from pipeline.extraction.reports import ModalityReport
from pipeline.media.images import decode_image
from tests.pipeline.backbones.checkpoints import bert_folder
from tests.pipeline.backbones.tiny import picture, prepare
from tests.pipeline.extraction.fakes import Watched, entry
from tests.pipeline.media.videos import write_video

IDS = ["a", "b", "c", "d", "e", "f"]
TEXT = ["red shoes", "blue shoes", None, "  ", "red shoes", "a very green hat"]
IMAGE = ["0.png", "1.png", "2.png", None, "0.png", "3.png"]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for seed in range(4):
        picture(tmp_path / "raw" / f"{seed}.png", seed)
    return tmp_path / "raw"


@pytest.fixture
def tiny(warehouse: Warehouse, raw: Path) -> Warehouse:
    prepare(warehouse, raw, ids=IDS, text=TEXT, image=IMAGE)
    return warehouse


def run(warehouse: Warehouse, **options: Any) -> ModalityReport:
    return extract_features(warehouse, "tiny", ExtractOptions(**options)).tables[0]


def table(
    warehouse: Warehouse, modality: str, level: str = "tokens", name: str = "watched"
) -> FeatureTable:
    return FeatureStore(warehouse).table("tiny", name, modality, level)


def read(warehouse: Warehouse, modality: str, **options: str) -> TokenMatrix:
    info = warehouse.info("tiny")
    stored = table(warehouse, modality, **options)
    return stored.read_tokens(info.items, info.fingerprint, info.inputs_of(modality))


def rows_of(matrix: TokenMatrix) -> list[Any]:
    return [
        np.asarray(matrix.values[start:end], dtype=np.float32)
        for start, end in zip(matrix.offsets[:-1], matrix.offsets[1:], strict=True)
    ]


def counts(report: ModalityReport) -> tuple[int, int, int, int, int]:
    failed = sum(report.failed.values())
    return report.encoded, report.shared, report.reused, report.absent, failed


def bare_image(raw: Path, name: str) -> Any:
    return Hashed().image(decode_image((raw / name).read_bytes()))


# -- levels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("modality", ["text", "image", "joint"])
def test_tokens_are_those_of_a_bare_loop(
    tiny: Warehouse, raw: Path, watched: Watched, modality: str
) -> None:
    report = run(tiny, level="tokens", batch_size=2, **{modality: "watched"})
    expected = {"text": (3, 1, 0, 2, 0), "image": (4, 1, 0, 1, 0), "joint": (3, 1, 0, 2, 0)}
    assert counts(report) == expected[modality]
    assert (report.level, report.dim) == ("tokens", DIM)
    rows = rows_of(read(tiny, modality))
    bare = Hashed()
    for row, text, image in zip(rows, TEXT, IMAGE, strict=True):
        has_text = bool((text or "").strip())
        is_present = {"text": has_text, "image": bool(image), "joint": has_text and bool(image)}
        if not is_present[modality]:
            assert row.shape == (0, DIM)
            continue
        texts = bare.texts([str(text)]) if modality != "image" else []
        images = [bare_image(raw, str(image))] if modality != "text" else []
        wanted = bare.tokens(InputBatch(images=images, texts=texts), "tokens")[0]
        assert row.shape == wanted.shape
        assert np.abs(row - wanted).max() < 1e-3
    light = table(tiny, modality).small_columns()
    assert light["n_tokens"].to_pylist() == [len(row) for row in rows if len(row)]


def test_hidden_states_after_a_block_are_the_librarys(tiny: Warehouse, tmp_path: Path) -> None:
    folder = bert_folder(tmp_path / "bert")
    report = run(tiny, text=str(folder), level="layer-1", dtype="float32", device="cpu")
    rows = rows_of(read(tiny, "text", level="layer-1", name="bert"))
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for row, text in zip(rows, TEXT, strict=True):
        if not (text or "").strip():
            continue
        with torch.inference_mode():
            states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
        assert np.abs(row - states.hidden_states[1][0].numpy()).max() < 1e-5
    made = table(tiny, "text", "layer-1", "bert").provenance()
    assert made is not None
    assert (made.level, made.dim) == ("layer-1", report.dim)
    assert "block 1" in made.pooling


def test_tokens_are_reused_shared_and_redone_like_vectors(
    tiny: Warehouse, raw: Path, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_writer, "BYTES_PER_PART", 3000)  # a word takes 256 bytes
    run(tiny, text="watched", level="tokens", batch_size=1)
    assert counts(run(tiny, text="watched", level="tokens")) == (0, 0, 4, 2, 0)
    before = rows_of(read(tiny, "text"))
    prepare(tiny, raw, ids=IDS[::-1], text=["new hat", *TEXT[::-1][1:]])
    with pytest.raises(UserError, match=r"text=watched:tokens .* --level tokens"):
        read(tiny, "text")
    assert counts(run(tiny, text="watched", level="tokens")) == (1, 0, 3, 2, 0)
    after = rows_of(read(tiny, "text"))
    assert len(after[0]) == 2
    assert all((a == b).all() for a, b in zip(after[1:], before[::-1][1:], strict=True))
    # The pooled table of the same backbone is another one.
    assert counts(run(tiny, text="watched")) == (3, 1, 0, 2, 0)


def test_long_rows_make_small_parts(
    warehouse: Warehouse, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_writer, "BYTES_PER_PART", 3000)
    texts = [f"word{i} again {i % 7}" for i in range(20)] + ["word0 again 0"] * 9
    prepare(warehouse, raw, ids=[f"i{n}" for n in range(29)], text=texts)
    report = run(warehouse, text="hashed", level="tokens")
    assert counts(report) == (20, 9, 0, 0, 0)
    parts = table(warehouse, "text", name="hashed").parts()
    assert len(parts) > 5
    assert all(part.stat().st_size < 9000 for part in parts)  # with the footer
    rows = rows_of(read(warehouse, "text", name="hashed"))
    for text, row in zip(texts, rows, strict=True):
        wanted = Hashed().tokens(InputBatch(texts=Hashed().texts([text])), "tokens")[0]
        assert np.abs(row - wanted).max() < 1e-3


def test_the_mapped_file_follows_the_table(tiny: Warehouse, raw: Path, watched: Watched) -> None:
    run(tiny, text="watched", level="tokens")
    folder = table(tiny, "text").path
    assert isinstance(read(tiny, "text").values, np.memmap)
    (first,) = folder.parent.glob("tokens-*.npy")
    stamp = first.stat().st_mtime_ns
    read(tiny, "text")
    assert first.stat().st_mtime_ns == stamp
    prepare(tiny, raw, ids=IDS, text=["other", *TEXT[1:]])
    run(tiny, text="watched", level="tokens")
    assert len(rows_of(read(tiny, "text"))[0]) == 1
    (second,) = folder.parent.glob("tokens-*.npy")
    assert second != first
    data = second.read_bytes()
    flipped = bytearray(data)
    flipped[200] ^= 1
    for damaged in (data[:-300], bytes(flipped), b""):  # the copy is made again
        second.write_bytes(damaged)
        assert len(rows_of(read(tiny, "text"))[0]) == 1
        assert second.read_bytes() == data


def test_rows_of_another_length_than_they_say_are_refused(
    tiny: Warehouse, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny, text="watched", level="tokens")
    plain = FeatureTable.small_columns

    def wrong(self: FeatureTable, columns: list[str]) -> Any:
        light = plain(self, columns)
        if "n_tokens" not in columns:
            return light
        column = light.schema.get_field_index("n_tokens")
        longer = pa.array([n + 1 for n in light["n_tokens"].to_pylist()], pa.int32())
        return light.set_column(column, light.schema.field(column), longer)

    monkeypatch.setattr(FeatureTable, "small_columns", wrong)
    with pytest.raises(UserError, match="n_tokens"):
        read(tiny, "text")


def test_sql_shows_tokens_apart_from_the_features(tiny: Warehouse, watched: Watched) -> None:
    run(tiny, text="watched", level="tokens")
    run(tiny, text="watched")
    rows = sql_views.query(
        tiny, "SELECT item_id, level, n_tokens, dim FROM tokens ORDER BY item"
    ).to_pylist()
    assert [row["item_id"] for row in rows] == ["a", "b", "e", "f"]
    assert {(row["level"], row["dim"]) for row in rows} == {("tokens", DIM)}
    flat = sql_views.query(
        tiny,
        "SELECT len(embedding) = n_tokens * dim AS whole FROM features_tiny_watched_text_tokens",
    )
    assert all(flat["whole"].to_pylist())
    levels = sql_views.query(tiny, "SELECT DISTINCT level FROM features").to_pylist()
    assert levels == [{"level": "pooled"}]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"text": "hashed", "level": "layer-2"},
            r"text level .*'hashed': 'layer-2'; known: pooled, tokens",
        ),
        (
            {"video": "hashed", "level": "tokens"},
            r"video .*'tokens'; known: pooled",
        ),
        ({"text": "hashed", "frames": 3}, r"--frames .*--video"),
        ({"text": "hashed", "decode": "draft"}, r"--decode draft .*--image"),
        ({"joint": "hashed", "decode": "fast"}, r"'fast'; known: exact, draft"),
        ({"text": "hashed", "device": "gpu"}, r"'gpu'; known: cpu, cuda"),
        ({"text": "hashed", "frames": 0}, r"--frames 0 .*1 to 1024"),
    ],
)
def test_what_does_not_fit_is_refused(
    warehouse: Warehouse, raw: Path, given: dict[str, Any], message: str
) -> None:
    write_video(raw / "0.mp4", frames=50)
    prepare(warehouse, raw, ids=["a"], text=["x"], image=["0.png"], video=["0.mp4"])
    with pytest.raises(UserError, match=message):
        run(warehouse, **given)


# -- joint ----------------------------------------------------------------------------------


def test_a_pair_is_stale_when_either_half_changes(
    tiny: Warehouse, raw: Path, watched: Watched
) -> None:
    assert counts(run(tiny, joint="watched")) == (3, 1, 0, 2, 0)
    assert counts(run(tiny, joint="watched")) == (0, 0, 4, 2, 0)
    picture(raw / "1.png", 50)
    assert counts(run(tiny, joint="watched")) == (1, 0, 3, 2, 0)
    prepare(tiny, raw, ids=IDS, text=[*TEXT[:-1], "another hat"], image=IMAGE)
    info = tiny.info("tiny")
    pooled = table(tiny, "joint", "pooled")
    with pytest.raises(UserError, match="other joint inputs"):
        pooled.read(info.items, info.fingerprint, info.inputs_of("joint"))
    assert counts(run(tiny, joint="watched")) == (1, 0, 3, 2, 0)
    matrix = pooled.read(info.items, info.fingerprint, info.inputs_of("joint"))
    bare = Hashed()
    wanted = bare.embed(
        InputBatch(images=[bare_image(raw, "3.png")], texts=bare.texts(["another hat"]))
    )
    assert np.abs(matrix.vectors[5].astype(np.float32) - wanted[0]).max() < 1e-3


def test_joint_needs_both(warehouse: Warehouse, raw: Path) -> None:
    prepare(warehouse, raw, ids=["a", "b"], text=["x", None], image=[None, "0.png"])
    with pytest.raises(UserError, match=r"tiny .*--joint"):
        run(warehouse, joint="hashed")


def test_a_bad_image_fails_its_pair(tiny: Warehouse, raw: Path) -> None:
    (raw / "1.png").write_bytes(b"no image")
    report = run(tiny, joint="hashed")
    assert counts(report) == (2, 1, 0, 2, 1)
    assert report.failed == {"not an image in a known format": 1}


# -- strict, memory, dry runs, frames, drafts -------------------------------------------------


def test_strict_stops_at_the_first_failure_and_keeps_what_is_encoded(
    tiny: Warehouse, raw: Path, watched: Watched
) -> None:
    (raw / "2.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"item 'c', '2\.png': not an image .*leave --strict out"):
        run(tiny, image="watched", strict=True, batch_size=1)
    picture(raw / "2.png", 9)
    report = run(tiny, image="watched", strict=True, batch_size=1)
    assert report.reused >= 1
    assert sum(counts(report)) == 6


class LittleMemory(Watched):
    """A backbone that has memory for ``room`` inputs at once."""

    room = 3
    refused = 0

    def embed(self, batch: InputBatch) -> Vectors:
        if max(len(batch.images), len(batch.texts)) > self.room:
            self.refused += 1
            raise self.error
        return super().embed(batch)

    error: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.mark.parametrize(
    ("modality", "error"),
    [
        ("image", LittleMemory.error),
        ("text", RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")),
        ("joint", MemoryError()),
    ],
)
def test_out_of_memory_halves_the_batch_goes_on_and_says_so(
    warehouse: Warehouse,
    raw: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    modality: str,
    error: Exception,
) -> None:
    n = 16
    names = [picture(raw / f"{i}.png", i, size=(8, 8)).name for i in range(n)]
    texts = [f"title {i}" for i in range(n)]
    prepare(warehouse, raw, ids=names, text=texts, image=names)
    backbone = LittleMemory("tight", tmp_path / "log.txt")
    backbone.error = error
    monkeypatch.setitem(BACKBONES, "tight", entry(backbone))
    messages: list[str] = []
    given: dict[str, Any] = {modality: "tight", "batch_size": 2 if modality == "text" else 8}
    report = extract_features(
        warehouse, "tiny", ExtractOptions(**given), notify=messages.append
    ).tables[0]
    assert report.encoded == n
    assert backbone.refused == len(messages) == 2  # remembered: 8, 4, then 2
    assert "out of memory with 8 inputs" in messages[0]
    assert "continuing with 2" in messages[1]
    backbone.room = 0
    backbone.checkpoint = "watched-2"
    with pytest.raises(UserError, match=r"out of memory with a single input .*--device cpu"):
        extract_features(warehouse, "tiny", ExtractOptions(**given, overwrite=True))


def test_another_error_of_the_model_is_ours(tiny: Warehouse, watched: Watched) -> None:
    def fail(vectors: Vectors) -> Vectors:
        raise RuntimeError("shapes do not match")

    watched.after = fail
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(tiny, text="watched")


@pytest.mark.parametrize("level", ["pooled", "tokens"])
def test_a_full_disk_loses_nothing_that_was_written(
    warehouse: Warehouse, raw: Path, watched: Watched, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    texts = [f"title {i}" for i in range(40)]
    prepare(warehouse, raw, ids=texts, text=texts)
    monkeypatch.setattr(table_writer, "SECONDS_PER_PART", 0.0)
    plain = pq.ParquetWriter.write_table
    room = 3

    def write(writer: pq.ParquetWriter, rows: pa.Table, *options: Any) -> None:
        nonlocal room
        if "features" in Path(writer.where).parts:
            room -= 1
            if room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
        plain(writer, rows, *options)

    with monkeypatch.context() as full:
        full.setattr(pq.ParquetWriter, "write_table", write)
        with pytest.raises(OSError, match="No space left"):
            run(warehouse, text="watched", level=level, batch_size=2)
    stored = table(warehouse, "text", level)
    kept = len(stored.small_columns())
    assert 0 < kept < 40
    assert not list(stored.path.glob(".*.tmp"))
    assert stored.manifest() is None
    report = run(warehouse, text="watched", level=level, batch_size=2)
    assert counts(report) == (40 - kept, 0, kept, 0, 0)


def test_no_room_for_the_mapped_file_is_an_error_and_leaves_nothing(
    tiny: Warehouse, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny, text="watched", level="tokens")

    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left"):
            read(tiny, "text")
    assert not list(table(tiny, "text").path.parent.glob("*tokens-*.npy*"))
    assert len(read(tiny, "text").values)


def test_a_dry_run_writes_nothing_and_estimates_what_is_written(
    warehouse: Warehouse, raw: Path
) -> None:
    texts = [f"number {i} of {i % 3}" for i in range(600)]
    prepare(warehouse, raw, ids=[f"i{n}" for n in range(600)], text=[None, *texts[1:]])
    for level in ("pooled", "tokens"):
        options = ExtractOptions(text="hashed", level=level, batch_size=8)
        before = sorted(warehouse.root.rglob("*"))
        (estimated,) = estimate_extraction(warehouse, "tiny", options)
        assert sorted(warehouse.root.rglob("*")) == before
        assert (estimated.items, estimated.rows, estimated.absent, estimated.probed) == (
            600,
            599,
            1,
            64,
        )
        assert estimated.tokens == (None if level == "pooled" else 4.0)
        assert estimated.seconds > 0
        written = extract_features(warehouse, "tiny", options).tables[0]
        assert abs(written.bytes / estimated.bytes - 1) < 0.15
        FeatureStore(warehouse).table("tiny", "hashed", "text", level).clear()


def test_frames_are_spread_evenly(warehouse: Warehouse, raw: Path) -> None:
    write_video(raw / "0.mp4", frames=250)
    prepare(warehouse, raw, ids=["a"], video=["0.mp4"])
    run(warehouse, video="hashed", frames=4)
    stored = table(warehouse, "video", "pooled", "hashed")
    assert stored.small_columns()["n_frames"].to_pylist() == [4]
    made = stored.provenance()
    assert made is not None
    assert made.preprocessing.startswith("4 evenly spread frames")
    with pytest.raises(UserError, match="other vectors"):
        run(warehouse, video="hashed")


def test_videos_of_damaged_files_are_marked(warehouse: Warehouse, raw: Path) -> None:
    whole = write_video(raw / "0.mkv", frames=100, fps=10, gop=10, noise=50).read_bytes()
    for name in ("1.mkv", "2.mkv"):
        (raw / name).write_bytes(whole[: int(len(whole) * 0.6)])
    prepare(
        warehouse, raw, ids=["a", "b", "c"], video=["0.mkv", "1.mkv", "2.mkv"],
        image=["0.png", None, None],
    )  # fmt: skip
    run(warehouse, image="hashed")
    assert run(warehouse, video="hashed").partial == 1
    query = "SELECT item_id, partial, modality FROM features ORDER BY modality, item"
    for _ in range(2):
        assert sql_views.query(warehouse, query).to_pylist() == [
            {"item_id": "a", "partial": None, "modality": "image"},
            {"item_id": "a", "partial": False, "modality": "video"},
            {"item_id": "b", "partial": True, "modality": "video"},
            {"item_id": "c", "partial": True, "modality": "video"},
        ]
        assert run(warehouse, video="hashed").reused == 3


def test_drafts_are_part_of_what_a_table_says_of_itself(warehouse: Warehouse, raw: Path) -> None:
    picture(raw / "large.jpg", 3, size=(1600, 1200))
    prepare(warehouse, raw, ids=["a"], image=["large.jpg"])
    run(warehouse, image="hashed", decode="draft")
    made = table(warehouse, "image", "pooled", "hashed").provenance()
    assert made is not None
    assert "scaled down in decoding" in made.preprocessing
    with pytest.raises(UserError, match="other vectors"):
        run(warehouse, image="hashed")
