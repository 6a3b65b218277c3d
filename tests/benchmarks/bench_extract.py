"""What extraction costs beside the model: items a second, over the bare forward loop.

    python -m tests.benchmarks.bench_extract --image FOLDER --text all-minilm-l6-v2 --items 256

The bare loop runs the same backbone with the same batches over inputs that are already decoded, or
tokenised and sorted by length: 1.00 means that everything else hides behind the model. The
weightless backbone shows the pipeline's own ceiling. Pictures are 640x480 JPEGs, texts have about
20 tokens; both are made here. Time is CPU seconds of all threads, which other work on the machine
disturbs least, and beside it the clock's; the better of two alternating repetitions counts.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from features.warehouse import Warehouse
from pipeline.backbones import BACKBONES, load_backbone
from pipeline.backends.contract import Backbone, Batch
from pipeline.encode import TOKENS_EACH
from pipeline.extract import extract
from pipeline.media import decode_image
from pipeline.stream import token_batches
from tests.pipeline.fakes import entry
from tests.pipeline.tiny import prepare


def make(raw: Path, n: int) -> tuple[list[str], list[str]]:
    """Draw n pictures and write n titles."""
    random = np.random.RandomState(0)
    raw.mkdir()
    words = ["".join(random.choice(list("abcdeilmnorstu"), 5)) for _ in range(999)]
    names, texts = [], []
    for i in range(n):
        coarse = random.randint(0, 256, (30, 40, 3), dtype=np.uint8)
        names.append(f"{i}.jpg")
        Image.fromarray(coarse).resize((640, 480)).save(raw / names[-1], quality=90)
        texts.append(" ".join(random.choice(words, random.randint(2, 12))))
    return names, texts


def bare_images(backbone: Backbone, raw: Path, names: list[str]) -> Callable[[], None]:
    inputs = [backbone.image(decode_image((raw / name).read_bytes())) for name in names]

    def loop() -> None:
        for start in range(0, len(inputs), backbone.batch_size):
            backbone.embed(Batch(images=inputs[start : start + backbone.batch_size]))

    return loop


def bare_texts(backbone: Backbone, texts: list[str]) -> Callable[[], None]:
    tokens = backbone.texts(texts)
    lengths = np.asarray([len(ids) for ids in tokens])
    size = backbone.batch_size
    batches = list(token_batches(lengths, budget=size * TOKENS_EACH, most=4 * size))

    def loop() -> None:
        for chosen in batches:
            backbone.embed(Batch(texts=[tokens[i] for i in chosen]))

    return loop


def best(*loops: Callable[[], None]) -> list[tuple[float, float]]:
    """CPU and wall seconds of each loop: the better of two rounds, in turns."""
    found = [(np.inf, np.inf)] * len(loops)
    for _ in range(2):
        for i, loop in enumerate(loops):
            cpu, wall = time.process_time(), time.perf_counter()
            loop()
            took = time.process_time() - cpu, time.perf_counter() - wall
            found[i] = min(found[i][0], took[0]), min(found[i][1], took[1])
    return found


def job(house: Warehouse, modality: str) -> Callable[[], None]:
    """Give the whole extraction from nothing, with the backbone that is already loaded."""

    def run() -> None:
        for part in (house.dataset_dir("tiny") / "features").rglob("part-*.parquet"):
            part.unlink()
        if modality == "image":
            extract(house, "tiny", image="loaded")
        else:
            extract(house, "tiny", text="loaded")

    return run


def main() -> None:
    """Measure the given backbones, and the weightless one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--image", default="hashed", help="backbone for pictures")
    parser.add_argument("--text", default="all-minilm-l6-v2", help="backbone for texts")
    parser.add_argument("--items", type=int, default=256)
    parser.add_argument("--device")
    parser.add_argument("--compute", default="float32")
    given = parser.parse_args()
    runs = [("image", given.image), ("text", given.text), ("image", "hashed"), ("text", "hashed")]
    print(f"{'CPU seconds, then the clock':34}{'bare/s':>9}{'extract/s':>10}{'ratio':>6}")
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        names, texts = make(raw, given.items)
        house = Warehouse(Path(folder) / "warehouse")
        prepare(house, raw, ids=names, image=names, text=texts)
        for modality, name in dict.fromkeys(runs):
            backbone = load_backbone(name, device=given.device, compute=given.compute)
            BACKBONES["loaded"] = entry(backbone)
            image = modality == "image"
            bare = bare_images(backbone, raw, names) if image else bare_texts(backbone, texts)
            bare()  # warm
            shutil.rmtree(house.dataset_dir("tiny") / "features", ignore_errors=True)
            line = f"{modality} {backbone.name:28}"
            for one, all_of_it in zip(*best(bare, job(house, modality)), strict=True):
                n = given.items
                line += f"{n / one:9.1f}{n / all_of_it:10.1f}{one / all_of_it:6.2f}"
            print(line)


if __name__ == "__main__":
    main()
