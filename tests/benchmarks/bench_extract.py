"""Measure what extraction costs in addition to the model, as ratios, in named sections.

    python -m tests.benchmarks.bench_extract [SECTION ...]

``images``, ``texts``, ``videos``
    Items a second of ``mmrec extract`` over the bare forward loop with the same backbone, batches
    and threads, on inputs that are decoded, or tokenised and sorted, in advance.
``ceiling``
    Images a second on one core with a model of no cost, and of a plain loop of PIL and the
    library's own transform.
``startup``
    CPU seconds of ``mmrec extract`` on one image, beyond those of a process that imports the
    libraries and loads the weights.
``sampling``
    Videos a second of sampling one frame a second, over PyAV decoding all frames in order.
``memory``
    Peak memory and time for ten times the items, without weights and with those of ViT-B/32 (only
    the first batches are run; the others have no effect on memory).

Architectures are the true ones, weights random. Figures are CPU seconds of all threads where other
work on the machine would disturb the clock, and the better of several alternating rounds.
"""

import argparse
import io
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import transformers
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from features.warehouse import Warehouse
from pipeline.backbones.base import Backbone, InputBatch
from pipeline.backbones.image_transforms import ImageTransform, of_open_clip, of_processor
from pipeline.backbones.loading import load_backbone
from pipeline.backbones.registry import BACKBONES
from pipeline.extraction.batching import token_batches
from pipeline.extraction.encoder import TOKENS_PER_TEXT
from pipeline.extraction.job import extract_features
from pipeline.extraction.options import ExtractOptions
from pipeline.extraction.reports import ExtractReport
from pipeline.media.images import decode_image
from pipeline.media.video import sample_frames
from tests.benchmarks import inputs
from tests.pipeline.extraction.fakes import entry

CPU = torch.device("cpu")
ROUNDS = 2
# The peak of getrusage is no measure here: a child inherits that of its parent.
_EXTRACT = """
import re, sys, time
from features.warehouse import Warehouse
from pipeline.extraction.job import extract_features
from pipeline.extraction.options import ExtractOptions
from pathlib import Path
root, modality, backbone = sys.argv[1:]
if backbone != "hashed":
    from pipeline.backbones.loading import load_backbone
    from pipeline.backbones.registry import BACKBONES
    from tests.pipeline.extraction.fakes import Brief, entry
    BACKBONES["brief"], backbone = entry(Brief(load_backbone(backbone))), "brief"
start = time.process_time()
extract_features(Warehouse(Path(root)), "tiny", ExtractOptions(**{modality: backbone}))
took = time.process_time() - start
status = Path("/proc/self/status").read_text()
print(took, int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) / 1024)
"""
_LOAD = """
import sys
import torch, open_clip
open_clip.create_model(f"local-dir:{sys.argv[1]}", require_pretrained=True, weights_only=True)
open_clip.get_tokenizer(f"local-dir:{sys.argv[1]}")
"""


def print_figure(section: str, what: str, figure: str, goal: str = "") -> None:
    """Print one row."""
    print(f"{section:8} {what:52} {figure:>32}  {goal}", flush=True)


def best(*loops: Callable[[], object], rounds: int = ROUNDS) -> list[tuple[float, float]]:
    """Return the CPU and wall seconds of each loop: the better of several alternating rounds."""
    fastest = [(np.inf, np.inf)] * len(loops)
    for _ in range(rounds):
        for i, loop in enumerate(loops):
            cpu, wall = time.process_time(), time.perf_counter()
            loop()
            took = time.process_time() - cpu, time.perf_counter() - wall
            fastest[i] = min(fastest[i][0], took[0]), min(fastest[i][1], took[1])
    return fastest


def job(warehouse: Warehouse, modality: str, decode: str = "exact") -> Callable[[], ExtractReport]:
    """Return a function that extracts from nothing with the backbone that is already loaded."""
    names: dict[str, Any] = {modality: "loaded"}

    def run() -> ExtractReport:
        shutil.rmtree(warehouse.dataset_dir("tiny") / "features", ignore_errors=True)
        report = extract_features(warehouse, "tiny", ExtractOptions(**names, decode=decode))
        (table,) = report.tables
        assert table.encoded == table.items  # otherwise the ratio compares different work
        return report

    return run


def loaded(backbone: Backbone) -> Backbone:
    BACKBONES["loaded"] = entry(backbone)
    return backbone


def bare_images(backbone: Backbone, prepared: list[Any]) -> Callable[[], None]:
    def loop() -> None:
        for start in range(0, len(prepared), backbone.batch_size):
            backbone.embed(InputBatch(images=prepared[start : start + backbone.batch_size]))

    return loop


def bare_texts(backbone: Backbone, texts: list[str]) -> Callable[[], None]:
    tokens = backbone.texts(texts)
    lengths = np.asarray([len(ids) for ids in tokens])
    size = backbone.batch_size
    batches = list(token_batches(lengths, max_tokens=size * TOKENS_PER_TEXT, max_texts=4 * size))

    def loop() -> None:
        for chosen in batches:
            backbone.embed(InputBatch(texts=[tokens[i] for i in chosen]))

    return loop


def compare(section: str, what: str, n: int, bare: Callable[[], None], run: Any, goal: str) -> None:
    bare()  # warm
    # Ratios near 1 need more rounds than the machine's other work spoils.
    (cpu_bare, wall_bare), (cpu, wall) = best(bare, run, rounds=3 * ROUNDS)
    print_figure(
        section, f"{what}: bare forward", f"{n / cpu_bare:.1f}/s CPU, {n / wall_bare:.1f}/s clock"
    )
    print_figure(section, f"{what}: extract", f"{n / cpu:.1f}/s CPU, {n / wall:.1f}/s clock")
    print_figure(
        section, f"{what}: ratio", f"{cpu_bare / cpu:.3f} CPU, {wall_bare / wall:.3f} clock", goal
    )


# -- the sections ---------------------------------------------------------------------------


def images(root: Path, n: int = 64) -> None:
    """Measure images through ViT-B/32 of both libraries."""
    warehouse = inputs.make_warehouse(root, images=n)
    raw = root / "raw"
    for what, folder in (
        ("CLIP ViT-B/32, open_clip", inputs.clip_b32(root / "clip")),
        ("ViT-B/32, transformers", inputs.vit_b32(root / "vit")),
    ):
        backbone = loaded(load_backbone(str(folder)))
        data = [(raw / f"{i}.jpg").read_bytes() for i in range(n)]
        bare = bare_images(backbone, [backbone.image(decode_image(file)) for file in data])
        compare("images", what, n, bare, job(warehouse, "image"), ">= 0.95")
        draft = job(warehouse, "image", "draft")
        compare("images", f"{what}, draft", n, bare, draft, ">= 0.95")


def texts(root: Path, n: int = 256) -> None:
    """Measure titles through CLIP's text encoder and BERT-base."""
    warehouse = inputs.make_warehouse(root, texts=n)
    for what, folder in (
        ("CLIP text encoder", inputs.clip_b32(root / "clip")),
        ("BERT-base", inputs.bert_base(root / "bert")),
    ):
        backbone = loaded(load_backbone(str(folder)))
        bare = bare_texts(backbone, inputs.titles(n))
        compare("texts", what, n, bare, job(warehouse, "text"), ">= 0.9")


def videos(root: Path, n: int = 6) -> None:
    """Measure videos at one frame a second through CLIP ViT-B/32."""
    warehouse = inputs.make_warehouse(root, videos=n)
    backbone = loaded(load_backbone(str(inputs.clip_b32(root / "clip"))))
    frames: list[Any] = []
    for i in range(n):
        with (root / "raw" / f"{i}.mp4").open("rb") as stream:
            frames.extend(sample_frames(stream, backbone.image)[0])
    run = job(warehouse, "video")
    compare("videos", "CLIP ViT-B/32, 11 frames each", n, bare_images(backbone, frames), run, "")


def ceiling(root: Path, n: int = 256) -> None:
    """Measure images a second on one core when the model is free."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    warehouse = inputs.make_warehouse(root, images=n)
    size = np.mean([path.stat().st_size for path in (root / "raw").iterdir()]) / 1000
    print_figure("ceiling", f"JPEG 640x480, {size:.0f} kB, one core", "")
    data = [path.read_bytes() for path in sorted((root / "raw").iterdir())]
    transform = image_transform_v2(PreprocessCfg(), is_train=False)
    processor = transformers.ViTImageProcessor()
    ways: dict[str, tuple[ImageTransform | None, Any]] = {
        "open_clip": (of_open_clip(PreprocessCfg(), CPU), transform),
        "transformers": (
            of_processor(processor, CPU),
            lambda image: processor(images=image, return_tensors="pt")["pixel_values"],
        ),
    }
    for library, (pixels, theirs) in ways.items():
        assert pixels is not None
        loaded(inputs.Free(pixels))  # type: ignore[arg-type]

        def plain(theirs: Any = theirs) -> None:
            for file in data:
                theirs(Image.open(io.BytesIO(file)).convert("RGB"))

        (base, _), (exact, exact_wall), (fast, fast_wall) = best(
            plain, job(warehouse, "image"), job(warehouse, "image", "draft"), rounds=3 * ROUNDS
        )
        print_figure(
            "ceiling", f"{library}: plain loop of PIL and its transform", f"{n / base:.0f}/s CPU"
        )
        for what, cpu, wall, goal in (
            ("exact", exact, exact_wall, ">= 250/s where plain is 210/s: 1.19"),
            ("draft", fast, fast_wall, ">= 375/s where plain is 210/s: 1.79"),
        ):
            figure = f"{n / cpu:.0f}/s CPU, {n / wall:.0f}/s clock, {base / cpu:.2f}"
            print_figure("ceiling", f"{library}: extract, {what}, and over plain", figure, goal)


def startup(root: Path) -> None:
    """Measure CPU seconds before the first item, beyond importing and loading."""
    warehouse = inputs.make_warehouse(root, images=1)
    folder = inputs.clip_b32(root / "clip")
    command = [sys.executable, "-c", "from cli.app import main; main()"]
    flags = ["extract", "--dataset", "tiny", "--image", str(folder)]
    environment = {**os.environ, "MMREC_WAREHOUSE": str(warehouse.root)}
    load = [sys.executable, "-c", _LOAD, str(folder)]
    took = {}
    for what, line in (("load", load), ("extract", command + flags)):
        took[what] = np.inf
        for _ in range(ROUNDS):
            shutil.rmtree(warehouse.dataset_dir("tiny") / "features", ignore_errors=True)
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(line, check=True, capture_output=True, env=environment)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            took[what] = min(took[what], cpu)
    print_figure(
        "startup", "importing the libraries, loading the weights", f"{took['load']:.2f} CPU s"
    )
    more = took["extract"] - took["load"]
    print_figure(
        "startup", "mmrec extract of one image, beyond that", f"{more:.2f} CPU s", "<= 5 s"
    )


def sampling(root: Path, seconds: int = 60) -> None:
    """Measure sampling over decoding all frames, at two distances of keyframes."""

    def small(image: Image.Image) -> Image.Image:
        return image.resize((224, 224))

    for gop in (25, 250):
        path = inputs.write_video(root / f"{gop}.mp4", seconds=seconds, gop=gop)

        def ours(path: Path = path) -> None:
            with path.open("rb") as stream:
                assert len(sample_frames(stream, small)[0]) == seconds

        def plain(path: Path = path) -> None:
            kept = 0
            with av.open(str(path)) as container:
                container.streams.video[0].codec_context.thread_count = 1
                for frame in container.decode(video=0):
                    if frame.time is not None and frame.time + 1e-6 >= kept:
                        small(frame.to_image())  # type: ignore[no-untyped-call]
                        kept += 1
            assert kept == seconds

        (base, _), (cpu, _) = best(plain, ours)
        what = f"{seconds} s of 640x360, a keyframe each {gop} frames"
        figure = f"{1 / base:.2f} and {1 / cpu:.2f} videos/s, {base / cpu:.2f}"
        print_figure("sampling", f"{what}: PyAV, sampling", figure)


def memory(root: Path, n: int = 100_000) -> None:
    """Measure peak memory and CPU seconds for ten times the items, each in a new process."""
    backbones = {"no weights": "hashed", "CLIP ViT-B/32": str(inputs.clip_b32(root / "clip"))}
    counts = (n // 10, n)
    warehouses = [inputs.small_images(root / str(count), count) for count in counts]
    for what, backbone in backbones.items():
        for modality in ("image", "text"):
            (less, low), (more, high) = (
                run_process(warehouse, modality, backbone) for warehouse in warehouses
            )
            name = f"{modality}, {what}"
            figure = f"{low:.0f} and {high:.0f} MiB, {high / low:.3f}"
            print_figure("memory", f"{name}: peak at {n // 10} and {n} items", figure, "<= 1.10")
            figure = f"{less:.1f} and {more:.1f} CPU s, {more / less / 10:.3f}"
            print_figure("memory", f"{name}: time, and each item's over linear", figure, "about 1")


def run_process(warehouse: Warehouse, modality: str, backbone: str) -> tuple[float, float]:
    """Return CPU seconds and peak MiB of an extraction in a new process."""
    shutil.rmtree(warehouse.dataset_dir("tiny") / "features", ignore_errors=True)
    line = [sys.executable, "-c", _EXTRACT, str(warehouse.root), modality, backbone]
    out = subprocess.run(line, check=True, capture_output=True, text=True).stdout.split()
    return float(out[0]), float(out[1])


SECTIONS: dict[str, Callable[..., None]] = {
    section.__name__: section
    for section in (images, texts, videos, ceiling, startup, sampling, memory)
}


def main() -> None:
    """Run the named sections, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sections", nargs="*", help=", ".join(SECTIONS))
    parser.add_argument("--items", type=int, help="instead of the section's own number")
    given = parser.parse_args()
    print_figure(
        "machine", f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}", ""
    )
    for name in given.sections or SECTIONS:
        more = {"n": given.items} if given.items else {}
        with tempfile.TemporaryDirectory() as folder:
            SECTIONS[name](Path(folder), **more)


if __name__ == "__main__":
    main()
