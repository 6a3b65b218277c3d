"""Clips as frames: one a second by timestamp, upright, up to where the file is damaged."""

from collections.abc import Callable
from typing import Any, BinaryIO

from PIL import Image

from pipeline.media import MediaError

PREPROCESSING = "1 frame a second"


def sample(stream: BinaryIO, prepare: Callable[[Image.Image], Any]) -> tuple[list[Any], bool]:
    """Decode the sampled frames of a clip and prepare each at once."""
    raise MediaError("decode", "clips cannot be decoded yet")
