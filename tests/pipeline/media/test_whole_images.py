"""An image whose rest is missing or zeros is a failure although decoders accept it."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.media.errors import MediaError
from pipeline.media.images import decode_image

NOISE = np.random.RandomState(0).randint(0, 256, (120, 160, 3), dtype=np.uint8)
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("PNG", {}),
    ("PNG", {"compress_level": 0}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
    ("AVIF", {}),
]


def encoded(pixels: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    pixels.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.85])
def test_an_image_whose_rest_is_zeros_is_refused(
    kind: str, options: dict[str, Any], mode: str, kept: float
) -> None:
    whole = encoded(Image.fromarray(NOISE).convert(mode), kind, **options)
    assert decode_image(whole).size == (160, 120)
    end = int(len(whole) * kept)
    with pytest.raises(MediaError) as caught:
        decode_image(whole[:end] + bytes(len(whole) - end))
    assert caught.value.stage == "decode"


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_an_animation_the_pixels_of_the_first_frame_are_checked(kind: str) -> None:
    frames = [Image.fromarray(NOISE), Image.fromarray(NOISE[::-1])]
    whole = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    expected = decode_image(whole).tobytes()
    place = int(len(whole) * 0.75)  # in the second frame
    assert decode_image(whole[:place] + bytes(len(whole) - place)).tobytes() == expected
    place //= 3
    with pytest.raises(MediaError):
        decode_image(whole[:place] + bytes(len(whole) - place))


@pytest.mark.parametrize("level", [0, 6])
@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
def test_changed_bytes_of_a_png_are_refused(mode: str, level: int) -> None:
    pixels = Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257)
    if mode != "I;16":
        pixels = Image.fromarray(NOISE).convert(mode)
    whole = bytearray(encoded(pixels, "PNG", compress_level=level))
    whole[len(whole) // 2] ^= 1
    with pytest.raises(MediaError, match="checksum"):
        decode_image(bytes(whole))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("shade", ["black", "white"])
@pytest.mark.parametrize("lossless", [False, True])
def test_plain_images_and_bytes_after_the_end_are_accepted(
    kind: str, shade: str, lossless: bool
) -> None:
    options = {"lossless": lossless} if kind == "WEBP" else {}
    for size in ((1, 1), (16, 16), (3000, 2000)):
        whole = encoded(Image.new("RGB", size, shade), kind, **options)
        assert decode_image(whole).size == size
        if kind != "AVIF":
            assert decode_image(whole + bytes(5000)).size == size
