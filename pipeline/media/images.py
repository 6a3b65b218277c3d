"""Decode images to RGB: of bounded size, turned upright, transparency on white.

Every fault of a file becomes a :class:`pipeline.media.errors.MediaError`.
"""

import io
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base
from PIL.IcoImagePlugin import IcoImageFile
from PIL.Image import Transpose

from pipeline.media.deep_images import deep_key_mask, restore_key, to_eight_bits
from pipeline.media.errors import MediaError, one_line
from pipeline.media.whole_images import check_rows, check_whole

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
_ICON, _PNG = b"\0\0\1\0", b"\x89PNG\r\n\x1a\n"
"""First bytes of an ICO and of a PNG."""
_OPTIONAL_ALPHA = ("BMP", "DIB", "TGA", "ICO", "DDS")
"""Formats whose writers may leave the alpha channel unset: all of its values are zero."""


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
        if isinstance(data, bytes):
            data = png_of_icon(data)
        with _open(data) if isinstance(data, bytes) else data as image:
            check_size(*image.size)
            if isinstance(data, bytes):
                check_whole(image.format, data)
            if draft is not None:
                size = image.size
                image.draft(None, (draft, draft))
                image.info[DRAFTED] = image.size != size
            with decoding_budget.reserve(image.width * image.height):
                image.load()
                if isinstance(data, bytes):
                    check_rows(image, data, draft)
                return _upright(_to_rgb(image, data), _orientation(image))
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


def png_of_icon(data: bytes) -> bytes:
    """Return the PNG within an ICO, which is decoded as other PNGs are; other data unchanged."""
    if not data.startswith(_ICON):
        return data
    with _open(data) as image:
        if not isinstance(image, IcoImageFile):
            return data
        entry = image.ico.entry[image.ico.getentryindex(image.size)]
    content = data[entry.offset : entry.offset + entry.size]
    return content if content.startswith(_PNG) else data


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


def _to_rgb(image: Image.Image, data: bytes | Image.Image) -> Image.Image:
    key_mask = None
    if image.format == "PNG" and isinstance(data, bytes):
        restore_key(image, data)
        key_mask = deep_key_mask(image, data)
    image = to_eight_bits(image)
    if key_mask is not None:
        white = Image.new("RGB", image.size, "white")
        white.paste(image.convert("RGB"), mask=key_mask)
        return white
    if image.mode == "La":  # Pillow converts it to LA only
        image = image.convert("LA")
    if _has_alpha(image) or "transparency" in image.info:
        pixels = image.convert("RGBA")
        white = Image.new("RGB", pixels.size, "white")
        white.paste(pixels, mask=pixels)
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _has_alpha(image: Image.Image) -> bool:
    if "A" not in image.mode.upper().replace("LAB", ""):
        return False
    return image.format not in _OPTIONAL_ALPHA or image.getchannel("A").getextrema() != (0, 0)
