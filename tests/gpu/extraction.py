"""Images a second through ViT-B/32 and ViT-L/14, and the time of each stage.

The models are ViT of transformers with the sizes of CLIP's image encoders and random weights. mmrec
computes in float32 or in bfloat16.
"""

import io
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from PIL import Image

from features.store import FeatureTable
from features.warehouse import Warehouse
from pipeline.backbones.base import InputBatch
from pipeline.backbones.image_transforms import ImageTransform
from pipeline.backbones.loading import load_backbone
from pipeline.backbones.registry import BACKBONES
from pipeline.extraction import loading
from pipeline.extraction.job import extract_features
from pipeline.extraction.options import ExtractOptions
from pipeline.media.images import decode_image
from tests.gpu.parts import Report, Setup
from tests.gpu.timing import best_seconds, free_bytes, rounded
from tests.pipeline.backbones.tiny import prepare
from tests.pipeline.extraction.fakes import entry

_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
MODELS: dict[str, dict[str, int]] = {
    "ViT-B/32": {**_BASE, "intermediate_size": 3072, "patch_size": 32},
    "ViT-L/14": {**_LARGE, "intermediate_size": 4096, "patch_size": 14},
}
_SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 32}
DECODE = ("exact", "draft")
COMPUTE = ("bfloat16", "float32")
_PHOTOS = 64  # different images; the others are copies with bytes after their end


def run(setup: Setup, report: Report) -> None:
    """Report the stages alone, and whole extractions with the seconds of their stages."""
    models = {"tiny": _SMALL} if setup.small else MODELS
    count = setup.size(4096, 8)
    with TemporaryDirectory() as folder:
        photos = [photo(seed) for seed in range(setup.size(_PHOTOS, 4))]
        warehouse = _prepare(Path(folder), photos, count)
        for name, sizes in models.items():
            weights = save_model(Path(folder) / name.replace("/", "-"), sizes)
            for compute in COMPUTE[: setup.size(2, 1)]:
                key = f"{name}, random weights, {compute}"
                backbone: Any = load_backbone(str(weights), device=setup.device, compute=compute)
                report(
                    f"{key}: images a second of each stage alone", _stages(setup, backbone, photos)
                )
                for decode in DECODE:
                    if setup.seconds_left:
                        figures = _extraction(warehouse, backbone, decode, count)
                        report(f"{key}: extraction, {decode} decoding", figures)
                del backbone
                free_bytes(setup.device)
            shutil.rmtree(weights)


def photo(seed: int) -> bytes:
    """Return a JPEG of 640x480 at quality 90, about 80 kB: smooth colours and some grain."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((640, 480))).astype(np.int16)
    grain = draw.integers(-4, 5, (480, 640, 1), dtype=np.int16)
    stream = io.BytesIO()
    pixels = np.clip(smooth + grain, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def save_model(folder: Path, sizes: dict[str, Any]) -> Path:
    """Save an image encoder with random weights and its processor; return the folder."""
    torch.manual_seed(0)
    transformers.ViTModel(transformers.ViTConfig(**sizes)).save_pretrained(folder)
    transformers.ViTImageProcessor().save_pretrained(folder)
    return folder


def _prepare(root: Path, photos: list[bytes], count: int) -> Warehouse:
    """Write a dataset of so many different images."""
    raw = root / "raw"
    raw.mkdir()
    names = [f"{number}.jpg" for number in range(count)]
    for number, name in enumerate(names):
        (raw / name).write_bytes(photos[number % len(photos)] + number.to_bytes(4))
    warehouse = Warehouse(root / "warehouse")
    warehouse.create()
    prepare(warehouse, raw, ids=names, image=names)
    return warehouse


def _stages(setup: Setup, backbone: Any, photos: list[bytes]) -> dict[str, float]:
    """Return what each stage does alone, in images a second; decode and resize on one core."""
    images = [decode_image(file) for file in photos]
    pixels = [backbone.image(image) for image in images]
    size = backbone.batch_size if setup.device == "cuda" else len(pixels)
    batch = [pixels[number % len(pixels)] for number in range(size)]
    device = torch.device(setup.device)
    normalized = ImageTransform(
        lambda image: np.asarray(image), mean=(0.5,) * 3, std=(0.5,) * 3, device=device
    )
    stages: dict[str, tuple[int, Callable[[], object]]] = {
        "decode, one core": (len(photos), lambda: [decode_image(file) for file in photos]),
        "resize, one core": (len(images), lambda: [backbone.image(image) for image in images]),
        "copy and normalize": (size, lambda: normalized.batch(batch)),
        "copy and forward": (size, lambda: backbone.embed(InputBatch(images=batch))),
    }
    return {
        name: rounded(number / best_seconds(setup, work)) for name, (number, work) in stages.items()
    }


class _Clock:
    """Sum the seconds of functions by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    def watch(self, name: str, work: Any, now: Callable[[], float] = time.perf_counter) -> Any:
        """Return the function, with its seconds added to those of the name."""

        def watched(*args: Any, **options: Any) -> Any:
            start = now()
            result = work(*args, **options)
            with self._lock:
                self.seconds[name] = self.seconds.get(name, 0.0) + now() - start
            return result

        return watched


def _extraction(warehouse: Warehouse, backbone: Any, decode: str, count: int) -> dict[str, float]:
    """Return images a second of a whole extraction, and the seconds of its stages.

    Decoding and resizing run in threads: their seconds are those of all cores. The vectors are
    copied back, so the seconds of the forward pass include it.
    """
    BACKBONES["loaded"] = entry(backbone)
    shutil.rmtree(warehouse.dataset_dir("tiny") / "features", ignore_errors=True)
    clock = _Clock()
    with (
        mock.patch.object(
            loading, "decode_image", clock.watch("decode", decode_image, time.thread_time)
        ),
        mock.patch.object(
            backbone, "image", clock.watch("resize", backbone.image, time.thread_time)
        ),
        mock.patch.object(backbone, "embed", clock.watch("copy and forward", backbone.embed)),
        mock.patch.object(FeatureTable, "append", clock.watch("write", FeatureTable.append)),
    ):
        began = time.perf_counter()
        report = extract_features(warehouse, "tiny", ExtractOptions(image="loaded", decode=decode))
        seconds = time.perf_counter() - began
    if report.tables[0].encoded != count:
        raise AssertionError(f"{report.tables[0].encoded} of {count} images have a vector")
    figures = {"images a second": rounded(count / seconds), "seconds": rounded(seconds)}
    return figures | {f"seconds of {name}": rounded(part) for name, part in clock.seconds.items()}
