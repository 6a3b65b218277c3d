"""Images and texts of several sizes, as the tests of all backbones encode them."""

import numpy as np
from PIL import Image

from pipeline.backbones.base import Backbone, InputBatch

TEXTS = ["a red shoe", "x", "words " * 6, "ein sehr viel laengerer satz"]


def pictures() -> list[Image.Image]:
    """Draw four images of noise."""
    random = np.random.RandomState(0)
    sizes = [(40, 30), (32, 32), (64, 90), (17, 50)]
    return [
        Image.fromarray(random.randint(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in sizes
    ]


def images(backbone: Backbone) -> InputBatch:
    return InputBatch(images=[backbone.image(image) for image in pictures()])


def texts(backbone: Backbone) -> InputBatch:
    return InputBatch(texts=backbone.texts(TEXTS))


def pairs(backbone: Backbone) -> InputBatch:
    return InputBatch(images=images(backbone).images, texts=texts(backbone).texts)


def one_by_one(batch: InputBatch) -> list[InputBatch]:
    """Split a batch into batches of one input."""
    return [
        InputBatch(images=batch.images[i : i + 1], texts=batch.texts[i : i + 1])
        for i in range(len(batch))
    ]
