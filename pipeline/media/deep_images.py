"""Convert images whose samples do not have 8 bits: greyscale of 16 and 32 bits and of floats.

Pillow converts such samples by cutting them off at 255, and it ignores some of the metadata.
"""

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.TiffTags import TAGS_V2

Samples = npt.NDArray[Any]
"""(H, W), in the type of the file."""

_TIFF_TAGS = {info.name: tag for tag, info in TAGS_V2.items()}
_UNSIGNED, _SIGNED = 1, 2
"""Values of TIFF's SampleFormat."""
_OVERSHOOT = 0.1
"""Part of the range by which samples may leave it, as resampling and highlights do."""
_INSIDE_SHARE = 0.95
"""Part of the nonzero samples that must lie in a range for it to be the range of an image."""


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale a greyscale image to 8 bits; return any other image as it is.

    Samples of 16 bits are scaled from the range of their type, or of 12 bits where the file says
    so. Floats are scaled from the first of the ranges 0 to 1, 0 to 255 and 0 to 65535 that holds
    nearly all of them, and the rest is clipped. Integers of 32 bits are scaled from 0 to 255 or
    0 to 65535. If no range fits, the smallest sample is black and the largest is white. A TIFF
    whose zero is white is inverted.
    """
    samples = _deep_samples(image)
    if samples is None:
        return image
    low, span = _value_range(image, samples)
    scale = 255.0 / span if span else 0.0
    is_inverted = image.mode != "L" and _tiff_tag(image, "PhotometricInterpretation", 1) == 0
    grey = np.empty(samples.shape, dtype=np.uint8)
    for rows in _strips(samples):  # floats of the whole image would take four times the memory
        grey[rows] = np.clip((_finite(samples[rows]) - low) * scale + 0.5, 0, 255)
        if is_inverted:
            grey[rows] = 255 - grey[rows]
    return Image.fromarray(grey)


def restore_key(image: Image.Image, png: bytes) -> None:
    """Scale the transparent grey of a PNG of 2 or 4 bits as Pillow scales its samples."""
    key, bits = image.info.get("transparency"), _png_bits(png)
    if image.mode == "L" and isinstance(key, int) and bits < 8:
        largest = (1 << bits) - 1
        image.info["transparency"] = (key & largest) * (255 // largest)


def deep_key_mask(image: Image.Image, png: bytes) -> Image.Image | None:
    """Return the opaque pixels of a PNG of 16 bits that has a transparent colour, else None.

    The image is loaded. Pillow compares the 16 bits of the colour with samples of 8 bits.
    """
    key = image.info.get("transparency")
    if key is None or _png_bits(png) != 16:
        return None
    if image.mode != "RGB":
        return Image.fromarray(np.asarray(image) != key)
    # Pillow keeps the upper byte of each sample. The lower one takes a second pass.
    with Image.open(io.BytesIO(png), formats=["PNG"]) as lower:
        lower.tile = [tile._replace(args="RGB;16L") for tile in lower.tile]
        lower.load()
        colour = np.array(key, dtype=np.uint16)
        is_opaque = (np.asarray(image) != colour >> 8).any(axis=2)
        is_opaque |= (np.asarray(lower) != colour & 255).any(axis=2)
    return Image.fromarray(is_opaque)


def _png_bits(png: bytes) -> int:
    """Return the bits of a sample by the header of a PNG, which is its first chunk."""
    return png[24]


def _deep_samples(image: Image.Image) -> Samples | None:
    """Return the samples of a deep greyscale image in the type of its file, else None."""
    bits, kind = _tiff_tag(image, "BitsPerSample", 8), _tiff_tag(image, "SampleFormat", _UNSIGNED)
    if image.mode == "L" and image.format == "TIFF" and kind == _SIGNED and bits == 8:
        return np.asarray(image).view(np.int8)
    if image.mode == "I" and image.format == "TIFF" and kind == _UNSIGNED and bits == 32:
        return np.asarray(image).view(np.uint32)
    return np.asarray(image) if image.mode.startswith("I") or image.mode == "F" else None


def _value_range(image: Image.Image, samples: Samples) -> tuple[float, float]:
    """Return the sample that is black, and how much more the white one is."""
    if image.mode.startswith("I;16"):
        return 0.0, 4095.0 if _tiff_tag(image, "BitsPerSample", 16) == 12 else 65535.0
    if image.mode == "I" and image.format == "PPM":  # Pillow scales any range to 16 bits
        return 0.0, 65535.0
    ends = [(part.min(), part.max()) for part in (_finite(samples[r]) for r in _strips(samples))]
    low, high = float(min(low for low, _ in ends)), float(max(high for _, high in ends))
    for white in (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0):
        if (low >= 0 and high <= white) or (image.mode == "F" and _mostly_fits(samples, white)):
            return 0.0, white
    return low, high - low


def _mostly_fits(samples: Samples, white: float) -> bool:
    n_nonzero = n_inside = 0
    for rows in _strips(samples):
        values = _finite(samples[rows])
        n_nonzero += int(np.count_nonzero(values))
        values = values[values != 0]
        is_inside = (values >= -_OVERSHOOT * white) & (values <= (1 + _OVERSHOOT) * white)
        n_inside += int(np.count_nonzero(is_inside))
    return n_inside >= _INSIDE_SHARE * n_nonzero


def _tiff_tag(image: Image.Image, name: str, default: int) -> int:
    """Return the first value of a tag of a TIFF; the default for any other format."""
    value = getattr(image, "tag_v2", {}).get(_TIFF_TAGS[name], default)
    return int(value[0] if isinstance(value, tuple) else value)


def _strips(samples: Samples) -> list[slice]:
    return [slice(start, start + 256) for start in range(0, len(samples), 256)]


def _finite(samples: Samples) -> npt.NDArray[np.float32]:
    return np.nan_to_num(samples.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
