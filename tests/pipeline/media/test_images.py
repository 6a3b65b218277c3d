import io
import math
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.media import images
from pipeline.media.errors import MediaError
from pipeline.media.images import DRAFTED, PixelBudget, decode_image, quiet_decoders
from pipeline.media.reader import MediaReader

# The first letter of the alphabet that has no symmetry: every orientation is told apart.
LETTER_F = np.array([[0, 0, 0], [0, 255, 255], [0, 0, 255], [0, 255, 255]], dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **more: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **more)
    return stream.getvalue()


def decoded(
    image: Image.Image, kind: str, **more: object
) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    rgb = decode_image(encoded(image, kind, **more))
    assert rgb.mode == "RGB"
    return np.asarray(rgb)


def refused(data: bytes) -> str:
    with pytest.raises(MediaError) as caught:
        decode_image(data)
    assert caught.value.stage == "decode"
    assert "\n" not in caught.value.reason
    return caught.value.reason


def photo(size: tuple[int, int], **more: object) -> bytes:
    """Return a JPEG of smooth colours, which scaling down hardly changes."""
    coarse = np.random.RandomState(0).randint(0, 256, (5, 6, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    return encoded(smooth, "JPEG", quality=95, **more)


def test_no_image_is_a_program() -> None:
    # Of those that have one, Ghostscript would run this for ever.
    assert refused(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop\n%%EOF\n") == (
        "not an image in a known format"
    )


@pytest.mark.parametrize(
    ("size", "draft", "expected"),
    [
        ((640, 480), 224, (320, 240)),
        ((640, 447), 224, (640, 447)),  # a half would be smaller than the model's input
        ((640, 448), 224, (320, 224)),
        ((645, 1801), 160, (162, 451)),
        ((2000, 1800), 32, (250, 225)),
        ((640, 480), 481, (640, 480)),
        ((640, 480), None, (640, 480)),
    ],
)
def test_a_draft_keeps_what_the_model_needs(
    size: tuple[int, int], draft: int | None, expected: tuple[int, int]
) -> None:
    data = photo(size)
    image = decode_image(data, draft)
    assert (image.mode, image.size) == ("RGB", expected)
    assert image.info.get(DRAFTED, False) == (expected != size)
    full = decode_image(data).resize(expected, Image.Resampling.BOX)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(full)).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_draft_is_turned_upright_too(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = photo((128, 96), exif=exif)
    full, half = decode_image(data), decode_image(data, 48)
    assert half.size == (full.width // 2, full.height // 2)
    assert half.size == ((64, 48) if orientation < 5 else (48, 64))
    assert half.info[DRAFTED]
    small = np.asarray(full.resize(half.size, Image.Resampling.BOX)).astype(int)
    assert np.abs(np.asarray(half) - small).mean() < 3


def test_a_draft_of_anything_else_is_the_whole() -> None:
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8))
    for kind in ("PNG", "WEBP", "GIF", "TIFF"):
        data = encoded(noise, kind)
        assert decode_image(data, 8).tobytes() == decode_image(data).tobytes()
    assert decode_image(noise.copy(), 8).size == (64, 64)  # pixels of an LMDB
    for mode in ("L", "CMYK"):
        data = encoded(noise.convert(mode), "JPEG")
        image = decode_image(data, 16)
        assert (image.mode, image.size, image.info[DRAFTED]) == ("RGB", (16, 16), True)


def test_plain_images_are_not_touched() -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (5, 7, 3), dtype=np.uint8)
    assert (decoded(Image.fromarray(pixels), "PNG") == pixels).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_ends_upright(orientation: int) -> None:
    # How a camera that was held so stores the letter: the inverse of what a viewer must do.
    stored = {
        1: LETTER_F,
        2: LETTER_F[:, ::-1],
        3: LETTER_F[::-1, ::-1],
        4: LETTER_F[::-1],
        5: LETTER_F.T,
        6: np.rot90(LETTER_F, 1),
        7: LETTER_F[::-1, ::-1].T,
        8: np.rot90(LETTER_F, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    assert (decoded(image, "PNG", exif=exif)[..., 0] == LETTER_F).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_what_is_transparent_becomes_white(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    more: dict[str, object] = {}
    if mode == "P":
        image = image.convert("P")
        image.putdata([0, 1])
        image.putpalette([9, 9, 9, 0, 0, 0])
        more = {"transparency": 0}
    elif mode in ("RGB", "L"):
        image = Image.new(mode, (2, 1), 9 if mode == "L" else (9, 9, 9))
        image.putpixel((1, 0), 0 if mode == "L" else (0, 0, 0))
        more = {"transparency": 9 if mode == "L" else (9, 9, 9)}
    else:
        image = image.convert(mode)
    assert decoded(image, "PNG", **more).tolist() == [[[255] * 3, [0] * 3]]


def test_half_transparent_is_half_white() -> None:
    assert decoded(Image.new("RGBA", (1, 1), (0, 0, 0, 127)), "PNG")[0, 0, 0] == 128


def test_sixteen_bits_keep_their_shades() -> None:
    deep = np.array([[0, 257 * 50, 257 * 128, 65535]], dtype=np.uint16)
    assert decoded(Image.fromarray(deep), "PNG")[0, :, 0].tolist() == [0, 50, 128, 255]
    assert decoded(Image.fromarray(deep), "TIFF")[0, :, 0].tolist() == [0, 50, 128, 255]


def test_floats_and_wide_integers_keep_their_shades() -> None:
    light = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    assert decoded(Image.fromarray(light), "TIFF")[0, :, 0].tolist() == [0, 128, 255]
    wide = np.array([[-100_000, 0, 100_000]], dtype=np.int32)
    assert decoded(Image.fromarray(wide), "TIFF")[0, :, 0].tolist() == [0, 128, 255]
    flat = np.full((2, 2), -5, dtype=np.int32)
    assert decoded(Image.fromarray(flat), "TIFF").tolist() == [[[0] * 3] * 2] * 2
    holes = np.array([[np.nan, 1.0, np.inf]], dtype=np.float32)
    assert decoded(Image.fromarray(holes), "TIFF")[0, :, 0].tolist() == [0, 255, 0]


def test_print_colours_become_screen_colours() -> None:
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # magenta and yellow
    red = decoded(ink, "TIFF")[0, 0]
    assert red[0] > 200
    assert max(red[1:]) < 60


def test_of_an_animation_the_first_frame_counts() -> None:
    first, second = Image.new("RGB", (3, 3), "red"), Image.new("RGB", (3, 3), "blue")
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        pixels = decoded(first, kind, save_all=True, append_images=[second])
        assert np.abs(pixels.astype(int) - [255, 0, 0]).max() < 8


def test_bombs_and_slivers_are_refused_before_they_are_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 3_000_000)

    def never(self: Image.Image) -> None:
        raise AssertionError("decoded")

    many = encoded(Image.new("L", (2000, 2000)), "PNG")
    thin = encoded(Image.new("L", (1, images.MAX_ASPECT + 1)), "PNG")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", never)
    assert refused(many) == "more than 3 megapixels"
    assert refused(thin) == "more than 500 times as long as wide"


def test_threads_share_a_budget_of_pixels() -> None:
    budget = PixelBudget(100)
    at_once = most = 0
    counting = threading.Lock()

    def decode(pixels: int) -> None:
        nonlocal at_once, most
        with budget.reserve(pixels):
            with counting:
                at_once += min(pixels, 100)
                most = max(most, at_once)
            time.sleep(0.002)
            with counting:
                at_once -= min(pixels, 100)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode, [16, 25, 36, 49, 81, 100, 1000] * 3))
    assert 50 < most <= 100
    assert at_once == 0


def test_decoding_waits_for_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = PixelBudget(100)
    monkeypatch.setattr(images, "decoding_budget", budget)
    data = encoded(Image.new("RGB", (10, 10)), "PNG")
    with ThreadPoolExecutor(1) as pool:
        with budget.reserve(1):
            image = pool.submit(decode_image, data)
            time.sleep(0.05)
            assert not image.done()
        assert image.result(timeout=60).size == (10, 10)


# The peak of getrusage is no measure here: a child inherits that of its parent.
_PEAK = """
import re, sys
from pathlib import Path
from pipeline.media.errors import MediaError
from pipeline.media.images import decode_image, quiet_decoders
from pipeline.media.reader import MediaReader
from pipeline.media.video import sample_frames

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

folder, before = Path(sys.argv[1]), peak()
media = MediaReader(folder)
with quiet_decoders():
    for path in sorted(folder.rglob("*.*")):
        name = str(path.relative_to(folder))
        try:
            if path.suffix in (".mp4", ".mkv", ".mov", ".avi"):
                with media.open(name) as stream:
                    sample_frames(stream, lambda image: image.resize((224, 224)))
            else:
                decode_image(media.read(name))
        except MediaError:
            pass
print(peak() - before)
"""


def peak(folder: Path) -> int:
    """Return the MiB that a new process needs to decode all files of a folder."""
    if not Path("/proc/self/status").exists():
        pytest.skip("this system has no /proc/self/status")
    command = [sys.executable, "-c", _PEAK, str(folder)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
def test_the_largest_images_stay_within_bounds(tmp_path: Path) -> None:
    side = math.isqrt(images.MAX_IMAGE_PIXELS)
    Image.new("RGBA", (side, side), (9, 9, 9, 9)).save(tmp_path / "a.png", compress_level=1)
    Image.new("1", (50_000, 50_000)).save(tmp_path / "c.png", compress_level=1)
    with (tmp_path / "d.png").open("wb") as stream:
        stream.write(encoded(Image.new("L", (9, 9)), "PNG"))
        stream.truncate(1 << 33)
    for name, refusal in (("c.png", "more than 89 megapixels"), ("d.png", "file larger")):
        with pytest.raises(MediaError, match=refusal):
            decode_image(MediaReader(tmp_path).read(name))
    assert peak(tmp_path) < 12.5 * side * side / (1 << 20)


@pytest.mark.slow
def test_odd_files_stay_within_bounds(real_data: Path) -> None:
    assert peak(real_data / "weird") < 200


def test_damage_has_a_reason_that_can_be_counted() -> None:
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = encoded(noise, "JPEG")
    assert refused(whole[:-600]) == "truncated file"
    assert refused(whole[:-300]) == "truncated file"
    assert refused(b"<html>not image</html>") == "not an image in a known format"


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]),
)
def test_whatever_the_damage_there_is_an_image_or_a_reason(data: st.DataObject, kind: str) -> None:
    whole = bytearray(encoded(Image.new("RGB", (16, 16), "teal"), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with quiet_decoders():
        try:
            outcome = decode_image(bytes(whole)).mode
        except MediaError as error:
            outcome = error.reason
    assert outcome == "RGB" or 3 < len(outcome) <= 160


def test_every_odd_file_gives_an_image_or_a_reason(real_data: Path) -> None:
    folder = real_data / "weird" / "images"
    refusals = {}
    with quiet_decoders():
        for path in sorted(folder.iterdir()):
            try:
                image = decode_image(MediaReader(folder).read(path.name))
                assert image.mode == "RGB"
                assert np.asarray(image).std() > 0 or min(image.size) <= 10
            except MediaError as error:
                refusals[path.name] = error.reason
    assert refusals == {
        "bmp_b_reallybig.bmp": "more than 89 megapixels",
        "broken_data_stream.png": "OSError: unrecognized data stream contents when reading"
        " image file",
        "decompression_bomb.gif": "more than 89 megapixels",
        "empty.jpg": "empty file",
        "libtiff_segfault.tif": "not an image in a known format",
        "png_decompression_dos.png": "ValueError: Decompressed data too large for"
        " PngImagePlugin.MAX_TEXT_CHUNK",
        "truncated_jpeg.jpg": "truncated file",
        "unknown_compression_method.png": "not an image in a known format",
    }


def test_the_same_image_in_every_dress_looks_the_same(real_data: Path) -> None:
    folder = real_data / "weird" / "images"
    plain = np.asarray(decode_image((folder / "hopper.png").read_bytes())).astype(int)
    dresses = [
        ".bmp",
        ".tif",
        ".webp",
        *(f"_orientation_{i}" for i in ("2.jpg", "4.jpg", "6.webp")),
    ]
    for name in ["avif_hopper.avif", *(f"hopper{dress}" for dress in dresses)]:
        other = np.asarray(decode_image((folder / name).read_bytes())).astype(int)
        assert np.abs(other - plain).mean() < 8, name
