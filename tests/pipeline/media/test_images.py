import io
import math
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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


RAMP = np.tile(np.arange(240, dtype=np.uint8), (60, 1))


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0])
@pytest.mark.parametrize(
    ("share", "stray"), [(0.0, 0.0), (1e-4, 1.02), (1e-4, -0.001), (1e-4, 900.0), (0.03, 4.0)]
)
def test_a_few_stray_floats_do_not_change_the_other_pixels(
    white: float, share: float, stray: float
) -> None:
    values = (RAMP / 255 * white).astype(np.float32)
    is_stray = np.random.RandomState(0).rand(*values.shape) < share
    is_stray[0, 0] = share > 0
    values[is_stray] = stray * white
    grey = decoded(Image.fromarray(values), "TIFF")[..., 0]
    assert np.abs(grey[~is_stray].astype(int) - RAMP[~is_stray]).max() <= 1
    assert (grey[is_stray] == (255 if stray > 0 else 0)).all()


def tiff(
    samples: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]", tags: dict[int, int]
) -> bytes:
    """Return an uncompressed TIFF of one strip; ``tags`` replace the usual ones."""
    height, width = samples.shape
    bits = 8 * samples.itemsize
    values = {
        256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 0, 277: 1, 278: height,
        279: samples.nbytes, 339: {"u": 1, "i": 2, "f": 3}[samples.dtype.kind], **tags,
    }  # fmt: skip
    values[273] = 8 + 2 + 12 * len(values) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, values[tag]) for tag in sorted(values))
    return b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + bytes(4) + samples.tobytes()


@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize(
    ("dtype", "white"), [("u1", 255), ("<u2", 65535), ("<f4", 1), ("<f4", 255), ("<f4", 65535)]
)
def test_a_tiff_says_which_sample_is_white(dtype: str, white: int, white_is_zero: bool) -> None:
    samples = (RAMP / 255 * white).round(0 if white > 1 else 9).astype(dtype)
    data = tiff(samples, {262: 0 if white_is_zero else 1})
    grey = np.asarray(decode_image(data))[..., 0].astype(int)
    assert np.abs(grey - (255 - RAMP if white_is_zero else RAMP)).max() <= 1


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [("<u4", 0, 4_294_967_295), ("<i4", -(2**31), 2**31 - 1), ("<i2", -9, 9), ("i1", -128, 127)],
)
def test_the_sign_of_integers_is_the_one_of_the_file(dtype: str, low: int, high: int) -> None:
    samples = np.array([[low, (low + high) // 2, high]]).astype(dtype)
    grey = np.asarray(decode_image(tiff(samples, {})))[0, :, 0].astype(int)
    assert np.abs(grey - [0, 127, 255]).max() <= 1


@pytest.mark.parametrize("maximum", [255, 300, 1023, 65535])
def test_a_dark_pgm_stays_dark(maximum: int) -> None:
    data = b"P5 3 1 %d\n" % maximum
    pixels = np.array([0, maximum // 50, maximum // 10])
    data += pixels.astype("u1" if maximum < 256 else ">u2").tobytes()
    expected = pixels / maximum * 255
    assert np.abs(np.asarray(decode_image(data))[0, :, 0] - expected).max() <= 1


def png(bits: int, colour: int, samples: list[int], key: list[int]) -> bytes:
    """Return a PNG of one row whose transparent colour is ``key``."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    row = "".join(format(sample, f"0{bits}b") for sample in samples)
    row += "0" * (-len(row) % 8)
    width = len(samples) // len(key)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0))
        + chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))
        + chunk(b"IDAT", zlib.compress(b"\0" + int(row, 2).to_bytes(len(row) // 8, "big")))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_colour_counts_at_any_depth(bits: int) -> None:
    largest = (1 << bits) - 1
    for key in {0, 1, largest}:
        samples = sorted({0, 1, 2 % (largest + 1), largest})
        grey = np.asarray(decode_image(png(bits, 0, samples, [key])))[0, :, 0]
        for sample, shade in zip(samples, grey.tolist(), strict=True):
            assert shade == (255 if sample == key else round(sample * 255 / largest))


@pytest.mark.parametrize("bits", [8, 16])
def test_a_transparent_colour_is_compared_in_all_of_its_bits(bits: int) -> None:
    key = [0x12, 0x34, 0x56] if bits == 8 else [0x1234, 0x3456, 0x5678]
    other = [key[0], key[1], key[2] + 1]
    rgb = np.asarray(decode_image(png(bits, 2, key + other, key)))
    assert rgb[0, 0].tolist() == [255] * 3
    assert rgb[0, 1].tolist() == [sample >> (bits - 8) for sample in other]


@pytest.mark.parametrize("kind", ["BMP", "DIB", "TGA", "DDS", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("alpha", [0, 9])
def test_an_alpha_channel_of_zeros_is_unset_where_writers_leave_it_so(
    kind: str, alpha: int
) -> None:
    pixels = np.dstack([RAMP] * 3 + [np.zeros_like(RAMP)])
    pixels[0, 0, 3] = alpha
    if kind in ("BMP", "DIB"):  # Pillow writes no mask for alpha
        data = struct.pack("<IiiHHIIiiII", 108, 240, -60, 1, 32, 3, pixels.nbytes, 0, 0, 0, 0)
        data += struct.pack("<4I", 0xFF, 0xFF00, 0xFF0000, 0xFF000000) + bytes(52)
        if kind == "BMP":
            data = b"BM" + struct.pack("<IHHI", 14 + 108 + pixels.nbytes, 0, 0, 14 + 108) + data
        data += pixels.tobytes()
    else:
        more = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        data = encoded(Image.fromarray(pixels), kind, **more)
    grey = np.asarray(decode_image(data))[..., 0]
    is_unset = alpha == 0 and kind not in ("PNG", "WEBP", "TIFF")
    assert (grey[1:] == (RAMP[1:] if is_unset else 255)).all()


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
from typing import Any
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


@pytest.mark.heavy
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


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("thumbnail", [False, True])
@pytest.mark.parametrize("kept", [0.5, 0.9, 0.999])
def test_a_jpeg_whose_rest_is_zeros_is_truncated(
    progressive: bool, thumbnail: bool, kept: float
) -> None:
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (90, 80, 3), dtype=np.uint8))
    small = encoded(noise.resize((8, 8)), "JPEG")  # it has an end-of-image marker
    exif = b"Exif\0\0" + small if thumbnail else b""
    whole = encoded(noise, "JPEG", progressive=progressive, exif=exif)
    end = int(len(whole) * kept)
    assert refused(whole[:end] + bytes(len(whole) - end)) == "truncated file"
    assert refused(whole[:-2] + bytes(100)) == "truncated file"
    pixels = decode_image(whole).tobytes()
    assert decode_image(whole + bytes(100)).tobytes() == pixels  # bytes after the end are allowed


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
        "broken_data_stream.png": "pixels with a wrong checksum",
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


@pytest.mark.parametrize(
    ("mode", "options"),
    [("RGBA", {}), ("LA", {}), ("RGB", {"transparency": (0, 0, 0)}), ("P", {"transparency": 0})],
)
def test_a_transparent_png_in_an_icon_is_white(mode: str, options: dict[str, Any]) -> None:
    stream = io.BytesIO()
    Image.new(mode, (32, 32), 0).save(stream, "PNG", **options)
    png = stream.getvalue()
    entry = struct.pack("<BBBBHHII", 32, 32, 0, 0, 1, 32, len(png), 22)
    icon = decode_image(struct.pack("<HHH", 0, 1, 1) + entry + png)
    assert icon.tobytes() == decode_image(png).tobytes() == b"\xff" * (32 * 32 * 3)
