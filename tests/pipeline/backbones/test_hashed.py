"""The weightless backbone: fixed vectors, similar for similar inputs."""

import numpy as np
import pytest
from PIL import Image

from pipeline.backbones.base import InputBatch
from pipeline.backbones.hashed import DIM, Hashed
from tests.pipeline.backbones.references import near

HASHED_TEXT = [0.079709, 0.201385, 0.076899]


HASHED_PICTURE = [-0.042948, -0.121053, 0.04136]


def test_hashed_is_the_same_everywhere_and_for_ever() -> None:
    """Numbers of the first version: they may only change together with its fingerprint."""
    backbone = Hashed()
    assert backbone.checkpoint == "hashed-1"
    text = backbone.embed(InputBatch(texts=backbone.texts(["red shoes"])))
    grey = backbone.embed(
        InputBatch(images=[backbone.image(Image.new("RGB", (9, 5), (200, 60, 10)))])
    )
    assert np.allclose(text[0, :3], HASHED_TEXT, atol=1e-5)
    assert np.allclose(grey[0, :3], HASHED_PICTURE, atol=1e-5)
    assert np.allclose(np.linalg.norm([text[0], grey[0]], axis=1), 1.0, atol=1e-5)


def test_hashed_brings_like_to_like() -> None:
    backbone = Hashed()
    text = backbone.embed(
        InputBatch(
            texts=backbone.texts(["red running shoes", "red running shoe", "quantum chemistry"])
        )
    )
    assert text[0] @ text[1] > 0.7
    assert abs(text[0] @ text[2]) < 0.3
    random = np.random.RandomState(0)
    pixels = random.randint(0, 256, (6, 8, 3), dtype=np.uint8)
    noisy = np.clip(pixels + random.randint(-9, 10, pixels.shape), 0, 255).astype(np.uint8)
    other = random.randint(0, 256, (6, 8, 3), dtype=np.uint8)
    drawn = [Image.fromarray(one).resize((80, 60)) for one in (pixels, noisy, other)]
    image = backbone.embed(InputBatch(images=[backbone.image(one) for one in drawn]))
    assert image[0] @ image[1] > 0.95
    assert image[0] @ image[2] < 0.8


@pytest.mark.parametrize("text", ["!!!", "日本", "\n\t?", "x" * 100_000, "e\u0301"])
def test_hashed_takes_any_text(text: str) -> None:
    backbone = Hashed()
    vector = backbone.embed(InputBatch(texts=backbone.texts([text, "a"])))[0]
    assert np.isclose(np.linalg.norm(vector), 1.0, atol=1e-5)


def test_hashed_has_tokens_and_pairs() -> None:
    ours = Hashed()
    words = ours.texts(["red running shoes", "!", "red"])
    tokens = ours.tokens(InputBatch(texts=words), "tokens")
    assert [one.shape for one in tokens] == [(3, DIM), (1, DIM), (1, DIM)]
    assert near(tokens[0][0], tokens[2][0])  # the same word
    # A text is the sum of its words' n-grams; a word alone is its own vector.
    assert near(tokens[2][0], ours.embed(InputBatch(texts=words[2:]))[0])
    red = Image.new("RGB", (40, 40), "red")
    red.paste("blue", (0, 0, 10, 10))
    seen = InputBatch(images=[ours.image(red)])
    cells = ours.tokens(seen, "tokens")[0]
    assert cells.shape == (16, DIM)
    assert cells[5] @ cells[15] > 0.999
    assert cells[0] @ cells[15] < 0.9
    both = InputBatch(images=list(seen.images) * 3, texts=words)
    joined = ours.tokens(both, "tokens")
    assert [len(one) for one in joined] == [19, 17, 17]
    assert near(joined[0], np.concatenate([cells, tokens[0]]))
    one = (ours.embed(seen)[0] + ours.embed(InputBatch(texts=words))[1]) / 2
    assert near(ours.embed(both)[1], one)
    assert ours.levels("joint") == ours.levels("text") == ("pooled", "tokens")
    assert ours.levels("video") == ("pooled",)
    assert ours.token_dim("tokens", "joint") == DIM
