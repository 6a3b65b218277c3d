"""Decode images to RGB: of bounded size, turned upright, transparency on white.

Every fault of a file becomes a :class:`pipeline.media.errors.MediaError`.
"""

import io
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base
from PIL.Image import Transpose

from pipeline.media.errors import MediaError, one_line

IMAGE_PREPROCESSING = "first frame, turned upright, alpha on white, 8 bits, RGB"
"""Description of :func:`decode_image` in a table's provenance."""
DRAFT_PREPROCESSING = (
    "JPEGs of twice the size or more scaled down in decoding (DCT), by 2, 4 or 8, and for open_clip"
    " resized by torchvision"
)
"""Description of ``draft`` in a table's provenance."""
DRAFTED = "drafted"
"""Key in the ``info`` of an image: True if the image was scaled down in decoding."""
FORMATS = (
    "JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "AVIF", "TIFF", "JPEG2000", "DIB", "ICO", "ICNS",
    "PSD", "PCX", "SGI", "QOI", "DDS", "TGA",
)  # fmt: skip
"""Formats of Pillow that are opened. EPS is left out: Ghostscript would run it as a program."""
MAX_IMAGE_PIXELS = 89_478_485
"""Size limit of one decoded image: a quarter of a gigabyte of RGB."""
MAX_ASPECT = 500
"""Limit of the longer side over the shorter one. Scaling a longer image takes gigabytes."""

_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


@contextmanager
def quiet_decoders() -> Iterator[None]:
    """Suppress Pillow's warnings about unusual files inside the block."""
    log = logging.getLogger("PIL")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is lower
            yield
    finally:
        log.setLevel(level)


def decode_image(data: bytes | Image.Image, draft: int | None = None) -> Image.Image:
    """Decode one image to RGB, upright; of an animation, the first frame.

    Args:
        data: The encoded image, or pixels that are converted only.
        draft: If given, a JPEG may be decoded at a half, a quarter or an eighth of its sides, as
            long as the shorter side keeps at least this many pixels.

    Raises:
        MediaError: The bytes are no image, are damaged, or exceed the size limits.
    """
    try:
        with _open(data) if isinstance(data, bytes) else data as image:
            check_size(*image.size)
            if draft is not None:
                size = image.size
                image.draft(None, (draft, draft))
                image.info[DRAFTED] = image.size != size
            with decoding_budget.reserve(image.width * image.height):
                image.load()
                return _upright(_to_rgb(image), _orientation(image))
    except MediaError:
        raise
    except UnidentifiedImageError:
        raise MediaError("decode", "not an image in a known format") from None
    except Image.DecompressionBombError:
        megapixels = MAX_IMAGE_PIXELS // 1_000_000
        raise MediaError("decode", f"more than {megapixels} megapixels") from None
    except Exception as error:  # a decoder's bug on a hostile file must not stop the job
        reason = "truncated file" if "truncated" in str(error) else one_line(error)
        raise MediaError("decode", reason) from None


def check_size(width: int, height: int, max_pixels: int | None = None) -> None:
    """Refuse an image that would take too much memory to decode or to scale.

    Raises:
        MediaError: The image has more than ``max_pixels`` pixels (default
            :data:`MAX_IMAGE_PIXELS`), or one side exceeds :data:`MAX_ASPECT` times the other.
    """
    max_pixels = MAX_IMAGE_PIXELS if max_pixels is None else max_pixels
    if width * height > max_pixels:
        raise MediaError("decode", f"more than {max_pixels // 1_000_000} megapixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise MediaError("decode", f"more than {MAX_ASPECT} times as long as wide")


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=FORMATS)


class PixelBudget:
    """Limit the pixels that all threads decode at one time; decoding takes 12 bytes a pixel.

    Args:
        pixels: The limit. A larger image is decoded while no other one is.
    """

    def __init__(self, pixels: int) -> None:
        self._limit = self._free = pixels
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, pixels: int) -> Iterator[None]:
        """Wait until so many pixels are free, and hold them inside the block."""
        pixels = min(pixels, self._limit)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


decoding_budget = PixelBudget(MAX_IMAGE_PIXELS)
"""The budget that all threads of this process share."""


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(Base.Orientation, 1))
    except Exception:  # broken EXIF is common; the pixels may still be sound
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    method = _UPRIGHT.get(orientation)
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    if "A" in image.mode.upper().replace("LAB", "") or "transparency" in image.info:
        pixels = image.convert("RGBA")
        white = Image.new("RGB", pixels.size, "white")
        white.paste(pixels, mask=pixels)
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale a deep greyscale image to 8 bits. Pillow's own conversion would cut it off at 255."""
    values = np.asarray(image)
    low, high = _value_range(values)
    if image.mode == "F" and low >= 0 and high <= 1:
        low, span = 0.0, 1.0
    elif low < 0 or high > 65535:
        span = high - low  # no convention fits: use the range of this image
    else:
        low, span = 0.0, 255.0 if high <= 255 and image.mode != "I;16" else float(_max_value(image))
    scale = 255.0 / span if span else 0.0
    grey = np.empty(values.shape, dtype=np.uint8)
    for rows in _strips(values):  # floats of the whole image would take four times the memory
        grey[rows] = np.clip((_finite(values[rows]) - low) * scale + 0.5, 0, 255)
    return Image.fromarray(grey)


def _value_range(values: npt.NDArray[Any]) -> tuple[float, float]:
    ends = [(part.min(), part.max()) for part in (_finite(values[r]) for r in _strips(values))]
    return float(min(low for low, _ in ends)), float(max(high for _, high in ends))


def _strips(values: npt.NDArray[Any]) -> list[slice]:
    return [slice(start, start + 256) for start in range(0, len(values), 256)]


def _finite(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    return np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)


def _max_value(image: Image.Image) -> int:
    """Return the largest value of a sample by the file's TIFF header, or 65,535 without one."""
    bits = getattr(image, "tag_v2", {}).get(258, (16,))
    count = bits[0] if isinstance(bits, tuple) else bits
    return (1 << int(count)) - 1 if count in (10, 12, 14, 16) else 65535
