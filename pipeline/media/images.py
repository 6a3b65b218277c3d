"""Pictures as they come in the wild, made into RGB: bounded, upright, on white.

Everything that can be wrong with a file ends in one :class:`MediaError` with a short reason, the
same for the same fault, so that failures can be counted by reason.
"""

import io
import logging
import os
import re
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base
from PIL.Image import Transpose

from features.errors import UserError
from pipeline.media.lmdb import LmdbImages, MissingKeyError
from pipeline.media.references import OUTSIDE, PREPARED, container, inside
from pipeline.media.tar import MissingMemberError, TarImages

PREPROCESSING = "first frame, turned upright, alpha on white, 8 bits, RGB"
DRAFT = (
    "JPEGs of twice the size or more scaled down in decoding (DCT), by 2, 4 or 8, and for open_clip"
    " resized by torchvision"
)
DRAFTED = "drafted"
"""In the ``info`` of a picture that was scaled down in decoding."""
FORMATS = (
    "JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "AVIF", "TIFF", "JPEG2000", "DIB", "ICO", "ICNS",
    "PSD", "PCX", "SGI", "QOI", "DDS", "TGA",
)  # fmt: skip
"""What is opened of what Pillow can. EPS is a program, run by another program if that is there."""
MAX_BYTES = 256 << 20  # of one encoded picture
MAX_PIXELS = 89_478_485  # of one decoded picture: a quarter of a gigabyte of RGB
MAX_ASPECT = 500  # beyond it, scaling the short side to a model's size costs gigabytes

_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


class MediaError(Exception):
    """An input that cannot be used: the ``stage`` that found it and a one-line ``reason``."""

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(reason)
        self.stage = stage
        self.reason = reason


@contextmanager
def quiet_decoders() -> Iterator[None]:
    """Keep Pillow's remarks on odd files off the terminal for as long as this lasts."""
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


class Media:
    """The bytes behind the references of items (see :mod:`pipeline.media.references`).

    Args:
        root: The raw root; what leads outside it is never read.
        prepared: The dataset's own folder, where preparing copied pictures from a table.
    """

    def __init__(self, root: Path, prepared: Path | None = None) -> None:
        self.root = root
        self._prepared = prepared
        self._containers: dict[Path, LmdbImages | TarImages | MediaError] = {}
        self._opening = threading.Lock()

    def read(self, reference: str) -> bytes | Image.Image:
        """Read the picture that ``reference`` names: encoded, or as pixels from some LMDBs.

        Raises:
            MediaError: There is nothing to read, or too much.
        """
        path = self._path(reference)
        # A plain file may have any name, also one that looks like a part of a container.
        if "#" in reference and (path is None or not os.path.isfile(path)):
            end = reference.find("#")
            while end != -1:
                whole = self._path(reference[:end])
                if whole is not None and (images := self._container(whole)) is not None:
                    return _member(images, reference[end + 1 :])
                end = reference.find("#", end + 1)
        path = _allowed(path)
        check_file(path, MAX_BYTES)
        with media_errors():
            return path.read_bytes()

    def open(self, reference: str) -> io.BufferedReader:
        """Open the clip that ``reference`` names.

        Raises:
            MediaError: There is nothing to read.
        """
        path = _allowed(self._path(reference))
        check_file(path)
        with media_errors():
            return path.open("rb")

    def close(self) -> None:
        """Close what was opened."""
        for images in self._containers.values():
            if not isinstance(images, MediaError):
                images.close()
        self._containers.clear()

    def _path(self, reference: str) -> Path | None:
        """The file that ``reference`` names, there or not; nothing when it may not be read."""
        if reference.startswith(OUTSIDE):
            return Path(reference.removeprefix(OUTSIDE))
        base: Path | None = self.root
        if reference.startswith(PREPARED):
            base, reference = self._prepared, reference.removeprefix(PREPARED)
        tail = inside(base, reference) if base is not None else None
        return base / tail if base is not None and tail is not None else None

    def _container(self, path: Path) -> LmdbImages | TarImages | None:
        with self._opening:
            if path not in self._containers:
                kind = container(path)
                if kind is None:
                    return None
                try:
                    self._containers[path] = _OPEN[kind](path)
                except (UserError, OSError):
                    self._containers[path] = MediaError("read", f"not a readable {kind}")
            found = self._containers[path]
        if isinstance(found, MediaError):
            raise found
        return found


_OPEN: dict[str, Callable[[Path], LmdbImages | TarImages]] = {"lmdb": LmdbImages, "tar": TarImages}


def _allowed(path: Path | None) -> Path:
    if path is None:
        raise MediaError("read", "leads outside the raw folder")
    return path


def _member(images: LmdbImages | TarImages, name: str) -> bytes | Image.Image:
    try:
        if isinstance(images, TarImages):
            _check_bytes(images.size(name), MAX_BYTES)
        return images.get(name)
    except MissingKeyError:
        raise MediaError("read", "no such key in the LMDB") from None
    except MissingMemberError:
        raise MediaError("read", "no such member in the tar") from None
    except UserError:
        if isinstance(images, TarImages):
            raise MediaError("read", "truncated tar") from None
        raise MediaError("decode", "not a picture of the kind that LMDBs hold") from None
    except (lmdb.Error, OSError) as error:
        raise MediaError("read", one_line(error)) from None


@contextmanager
def media_errors() -> Iterator[None]:
    """Turn the system's errors on reading into a :class:`MediaError`."""
    try:
        yield
    except FileNotFoundError:
        raise MediaError("read", "file not found") from None
    except PermissionError:
        raise MediaError("read", "no permission to read the file") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise MediaError("read", one_line(error)) from None


def check_file(path: Path, max_bytes: int | None = None) -> None:
    """Make sure that ``path`` is a plain file: reading a device or a pipe might never end.

    Raises:
        MediaError: It is not, or it is larger than ``max_bytes``.
    """
    with media_errors():
        status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise MediaError("read", "is a folder")
    if not stat.S_ISREG(status.st_mode):
        raise MediaError("read", "is no plain file")
    _check_bytes(status.st_size, max_bytes)


def _check_bytes(size: int, max_bytes: int | None) -> None:
    if size == 0:
        raise MediaError("read", "empty file")
    if max_bytes is not None and size > max_bytes:
        raise MediaError("read", f"file larger than {max_bytes >> 20} MiB")


def decode_image(data: bytes | Image.Image, draft: int | None = None) -> Image.Image:
    """Decode one picture to RGB as people see it; of an animation, the first frame.

    Args:
        data: The encoded picture.
        draft: Decode a JPEG at a half, a quarter or an eighth of its sides, of which the smaller
            keeps at least so many pixels (:data:`DRAFT` says so in provenance).

    Raises:
        MediaError: The bytes are no picture, damaged, or larger than the limits.
    """
    try:
        with _opened(data) if isinstance(data, bytes) else data as image:
            check_size(*image.size)
            if draft is not None:
                size = image.size
                image.draft(None, (draft, draft))
                image.info[DRAFTED] = image.size != size
            with _decoding.take(image.width * image.height):
                image.load()
                return _upright(_rgb(image), _orientation(image))
    except MediaError:
        raise
    except UnidentifiedImageError:
        raise MediaError("decode", "not a picture in a known format") from None
    except Image.DecompressionBombError:
        raise MediaError("decode", f"more than {MAX_PIXELS // 1_000_000} megapixels") from None
    except Exception as error:  # a decoder's bug on a hostile file must not stop the job
        reason = "truncated file" if "truncated" in str(error) else one_line(error)
        raise MediaError("decode", reason) from None


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=FORMATS)


class _Budget:
    """As many pixels as may be decoded at once, in all threads; decoding takes 12 bytes for one."""

    def __init__(self, most: int) -> None:
        self._most = self._free = most
        self._changed = threading.Condition()

    @contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Wait until there is room, which a picture of more than all has when it is alone."""
        pixels = min(pixels, self._most)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


_decoding = _Budget(MAX_PIXELS)


def check_size(width: int, height: int, most: int | None = None) -> None:
    """Refuse what would take too much memory to decode or to scale.

    Raises:
        MediaError: More pixels than ``most`` (by default ``MAX_PIXELS``), or longer than
            ``MAX_ASPECT`` times its width.
    """
    most = MAX_PIXELS if most is None else most
    if width * height > most:
        raise MediaError("decode", f"more than {most // 1_000_000} megapixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise MediaError("decode", f"more than {MAX_ASPECT} times as long as wide")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(Base.Orientation, 1))
    except Exception:  # broken EXIF is common and says nothing about the picture
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    method = _UPRIGHT.get(orientation)
    return image if method is None else image.transpose(method)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if "A" in image.mode.upper().replace("LAB", "") or "transparency" in image.info:
        pixels = image.convert("RGBA")
        white = Image.new("RGB", pixels.size, "white")
        white.paste(pixels, mask=pixels)
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale a deep greyscale picture to 8 bits; Pillow's own conversion would clip it to white."""
    values = np.asarray(image)
    low, high = _range(values)
    if image.mode == "F" and low >= 0 and high <= 1:
        low, full = 0.0, 1.0
    elif low < 0 or high > 65535:
        full = high - low  # no convention fits: use the range there is
    else:
        low, full = 0.0, 255.0 if high <= 255 and image.mode != "I;16" else float(_depth(image))
    scale = 255.0 / full if full else 0.0
    grey = np.empty(values.shape, dtype=np.uint8)
    for rows in _strips(values):  # in strips, for floats of the whole would take four times as much
        grey[rows] = np.clip((_finite(values[rows]) - low) * scale + 0.5, 0, 255)
    return Image.fromarray(grey)


def _range(values: npt.NDArray[Any]) -> tuple[float, float]:
    ends = [(part.min(), part.max()) for part in (_finite(values[r]) for r in _strips(values))]
    return float(min(low for low, _ in ends)), float(max(high for _, high in ends))


def _strips(values: npt.NDArray[Any]) -> list[slice]:
    return [slice(start, start + 256) for start in range(0, len(values), 256)]


def _finite(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    return np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)


def _depth(image: Image.Image) -> int:
    """The largest value that a sample of this file can have, when the file says so."""
    bits = getattr(image, "tag_v2", {}).get(258, (16,))
    count = bits[0] if isinstance(bits, tuple) else bits
    return (1 << int(count)) - 1 if count in (10, 12, 14, 16) else 65535


def one_line(error: BaseException) -> str:
    """Say an error in one line of bounded length."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    kind = type(error).__name__
    return f"{kind}: {text}"[:160] if text else kind
