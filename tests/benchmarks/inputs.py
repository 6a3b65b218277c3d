"""Inputs of the extraction benchmarks, generated: images, titles, videos and models."""

import io
import tarfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import open_clip
import torch
import transformers
from PIL import Image

from features.warehouse import Warehouse
from pipeline.backbones.base import InputBatch, TokenIds, Vectors
from pipeline.backbones.image_transforms import ImageTransform, Pixels8
from tests.pipeline.backbones.checkpoints import open_clip_folder
from tests.pipeline.backbones.tiny import prepare

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def photo(seed: int) -> bytes:
    """Return a JPEG of 640x480 at quality 90, about 80 kB: smooth colours and some grain."""
    random = np.random.RandomState(seed)
    coarse = random.randint(0, 256, (30, 40, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((640, 480))).astype(np.int16)
    grain = random.randint(-4, 5, (480, 640, 1), dtype=np.int16)
    stream = io.BytesIO()
    pixels = np.clip(smooth + grain, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def titles(n: int) -> list[str]:
    """Return titles of some 20 tokens, of very unequal length."""
    random = np.random.RandomState(0)
    words = ["".join(random.choice(list(LETTERS), 5)) for _ in range(999)]
    return [" ".join(random.choice(words, random.randint(2, 20))) for _ in range(n)]


def write_video(
    path: Path, *, seconds: int, gop: int, size: tuple[int, int] = (640, 360), seed: int = 0
) -> Path:
    """Write H.264 at 25 frames a second: a moving texture, a new one every 7 seconds."""
    wide, high = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = wide, high, "yuv420p"
        stream.options = {
            "preset": "veryfast", "g": str(gop), "x264-params": "scenecut=0:log-level=none",
        }  # fmt: skip
        for index in range(25 * seconds):
            if index % 175 == 0:
                random = np.random.RandomState(seed * 10_000 + index)
                coarse = random.randint(0, 256, (high // 12, wide // 12, 3), dtype=np.uint8)
                texture = np.asarray(Image.fromarray(coarse).resize(size))
            moved = np.roll(texture, (index, 2 * index), axis=(0, 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def make_warehouse(root: Path, *, images: int = 0, texts: int = 0, videos: int = 0) -> Warehouse:
    """Return a warehouse with the dataset ``tiny`` of so many images, texts and videos."""
    raw = root / "raw"
    raw.mkdir(parents=True)
    n = max(images, texts, videos)
    for i in range(images):
        (raw / f"{i}.jpg").write_bytes(photo(i))
    for i in range(videos):
        # The videos differ, because identical content is encoded once.
        write_video(raw / f"{i}.mp4", seconds=10 + i % 3, gop=25, size=(320, 240), seed=i)
    warehouse = Warehouse(root / "warehouse")
    warehouse.create()
    prepare(
        warehouse, raw, ids=[str(i) for i in range(n)],
        image=[f"{i}.jpg" if i < images else None for i in range(n)],
        video=[f"{i}.mp4" if i < videos else None for i in range(n)],
        text=[*titles(texts), *[None] * (n - texts)],
    )  # fmt: skip
    return warehouse


def small_images(root: Path, n: int) -> Warehouse:
    """Return a dataset of n small images, all different, in one tar."""
    raw = root / "raw"
    raw.mkdir(parents=True)
    random = np.random.RandomState(0)
    with (raw / "images.tar").open("wb") as out:
        for i in range(n):
            stream = io.BytesIO()
            pixels = random.randint(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(stream, "PNG", compress_level=0)
            member = tarfile.TarInfo(f"{i}.png")
            member.size = len(stream.getvalue())
            out.write(member.tobuf(tarfile.GNU_FORMAT))
            out.write(stream.getvalue() + bytes(-member.size % 512))
        out.write(bytes(1024))
    warehouse = Warehouse(root / "warehouse")
    warehouse.create()
    names = [f"images.tar#{i}.png" for i in range(n)]
    prepare(warehouse, raw, ids=[str(i) for i in range(n)], image=names, text=titles(n))
    return warehouse


def clip_b32(folder: Path) -> Path:
    """Save CLIP ViT-B/32 with random weights, as open_clip stores it."""
    return open_clip_folder(folder, **dict(open_clip.get_model_config("ViT-B-32")))


def bert_base(folder: Path) -> Path:
    """Save BERT-base with random weights and a tokenizer of one token for each letter."""
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS)]
    transformers.BertModel(transformers.BertConfig()).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def vit_b32(folder: Path) -> Path:
    """Save ViT-B/32 with random weights, as transformers stores it."""
    torch.manual_seed(0)
    transformers.ViTModel(transformers.ViTConfig(patch_size=32)).save_pretrained(folder)
    transformers.ViTImageProcessor().save_pretrained(folder)
    return folder


class Free:
    """A backbone that prepares images as others do and costs nothing beyond."""

    modalities = ("image", "video")
    dim = 512
    checkpoint = "free"
    compute = "float32"
    batch_size = 32
    input_size = 224

    def __init__(self, pixels: ImageTransform) -> None:
        self.name = "free"
        self.libraries: dict[str, str] = {}
        self._pixels = pixels

    def __getattr__(self, name: str) -> Any:
        # Whatever else the contract asks for is as it is with the weightless backbone.
        from pipeline.backbones.hashed import Hashed

        return getattr(Hashed(), name)

    def preprocessing(self, modality: str) -> str:
        return "as others"

    def pooling(self, modality: str, level: str = "pooled") -> str:
        return "none"

    def image(self, picture: Image.Image) -> Pixels8:
        return self._pixels.prepare(picture)

    def texts(self, texts: list[str]) -> list[TokenIds]:
        raise NotImplementedError

    def embed(self, batch: InputBatch) -> Vectors:
        x_BCHW = self._pixels.batch(list(batch.images))
        return x_BCHW[:, 0, :4, :128].reshape(-1, self.dim).cpu().numpy()
