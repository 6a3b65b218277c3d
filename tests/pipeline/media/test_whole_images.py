"""An image whose rest is missing or zeros is a failure although decoders accept it."""

import io
import struct
import zlib
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


JPEG_OPTIONS: list[dict[str, Any]] = [
    {},
    {"quality": 5},
    {"quality": 100},
    {"subsampling": 0},
    {"restart_marker_rows": 1},
    {"optimize": True, "quality": 92},
]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", JPEG_OPTIONS)
@pytest.mark.parametrize("place", [0.3, 0.6, 0.8])
def test_zeros_in_the_middle_of_a_jpeg_are_refused(
    mode: str, options: dict[str, Any], place: float
) -> None:
    pixels = Image.fromarray(NOISE.repeat(3, 0).repeat(3, 1)[::2]).convert(mode)
    whole = encoded(pixels, "JPEG", **options)
    assert decode_image(whole).size == pixels.size
    start = int(len(whole) * place)
    with pytest.raises(MediaError) as caught:
        decode_image(whole[:start] + bytes(512) + whole[start + 512 :])
    assert caught.value.stage == "decode"


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("shade", ["black", "white", "grey"])
@pytest.mark.parametrize("options", [*JPEG_OPTIONS, {"progressive": True}, {"optimize": True}])
def test_plain_jpegs_are_accepted(mode: str, shade: str, options: dict[str, Any]) -> None:
    pixels = Image.new("RGB", (1500, 1000), shade)
    pixels.paste(Image.fromarray(NOISE), (700, 400))
    whole = encoded(pixels.convert(mode), "JPEG", **options)
    assert decode_image(whole).size == (1500, 1000)
    assert decode_image(whole + bytes(5000) + whole).size == (1500, 1000)


def png(pixels: np.ndarray[Any, Any], rows: int, passes: tuple[tuple[int, ...], ...] = ()) -> bytes:
    """Encode the first rows of the last pass under a header that promises all of them."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    height, width, channels = pixels.shape
    depth, colour = 8 * pixels.itemsize, {1: 0, 3: 2, 4: 6}[channels]
    lines = [
        b"\0" + line.astype(pixels.dtype.newbyteorder(">")).tobytes()
        for left, top, across, down in passes or ((0, 0, 1, 1),)
        if left < width
        for line in pixels[top::down, left::across]
    ]
    lines = lines[: len(lines) - (height - rows)]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, bool(passes))
    content = zlib.compress(b"".join(lines))
    middle = len(content) // 2
    data = chunk(b"IDAT", content[:middle]) + chunk(b"IDAT", content[middle:])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


ADAM7 = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
    (0, 1, 1, 2),
)  # fmt: skip


@pytest.mark.parametrize("passes", [(), ADAM7])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("size", [(9, 10), (120, 160), (7, 3)])
def test_a_png_with_fewer_rows_than_its_header_says_is_refused(
    passes: tuple[tuple[int, ...], ...], channels: int, kind: Any, size: tuple[int, int]
) -> None:
    pixels = np.random.RandomState(0).randint(1, 200, (*size, channels)).astype(kind)
    for shown in (pixels, np.zeros_like(pixels)):
        assert decode_image(png(shown, size[0], passes)).size == size[::-1]
        for rows in (size[0] - 1, size[0] - 2):
            with pytest.raises(MediaError, match="truncated"):
                decode_image(png(shown, rows, passes))


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("level", [0, 6])
def test_a_png_whose_compressed_pixels_break_off_is_refused(kept: float, level: int) -> None:
    whole = encoded(Image.fromarray(NOISE), "PNG", compress_level=level)
    content = b""
    position = 8
    while position < len(whole):
        length, kind = struct.unpack_from(">I4s", whole, position)
        content += whole[position + 8 : position + 8 + length] if kind == b"IDAT" else b""
        position += 12 + length
    content = content[: int(len(content) * kept)]
    check = struct.pack(">I", zlib.crc32(b"IDAT" + content))
    data = struct.pack(">I", len(content)) + b"IDAT" + content + check
    with pytest.raises(MediaError, match="truncated"):
        decode_image(whole[:33] + data + whole[-12:])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimize": True},
        {"subsampling": 0},
        {"restart_marker_rows": 2},
        {"progressive": True},
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("draft", [None, 50])
def test_a_cut_jpeg_with_a_new_end_marker_is_refused(
    options: dict[str, Any], mode: str, draft: int | None
) -> None:
    sides = np.kron(NOISE, np.ones((3, 3, 1), np.uint8))[:301, :403]
    white_below = np.concatenate([sides, np.full_like(sides, 255)])
    for pixels in (sides, white_below):
        whole = encoded(Image.fromarray(pixels).convert(mode), "JPEG", **options)
        decode_image(whole, draft)
        for kept in (0.3, 0.55):
            with pytest.raises(MediaError, match="truncated file"):
                decode_image(whole[: int(len(whole) * kept)].rstrip(b"\xff") + b"\xff\xd9", draft)


@pytest.mark.parametrize("after", [b"", b"\0" * 2000, b"trailer \xff\xd9"])
@pytest.mark.parametrize("size", [(1, 1), (9, 17), (160, 120)])
@pytest.mark.parametrize("draft", [None, 1, 30])
def test_a_whole_jpeg_with_a_plain_end_is_accepted(
    after: bytes, size: tuple[int, int], draft: int | None
) -> None:
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 1}):
        decode_image(encoded(Image.new("RGB", size, "white"), "JPEG", **options) + after, draft)
