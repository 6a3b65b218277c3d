"""Refuse encoded images whose end is missing or damaged although decoders accept them.

A download that breaks off may leave a file of the full size whose rest is zeros. JPEG has a marker
at the end and PNG has checksums. WebP and AVIF have neither, but their compressed pixels do not end
in many zeros.
"""

import re
import struct
import zlib
from collections.abc import Iterator

from pipeline.media.errors import MediaError

_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff])")
_MOST_ZEROS = 1024
"""Bytes of zeros at the end of compressed pixels from which on the end is taken as missing."""


def check_whole(kind: str | None, data: bytes) -> None:
    """Refuse an encoded image whose end is missing or damaged.

    Args:
        kind: Format of the image by the name that Pillow gives it; most formats are not checked.
        data: The encoded image.

    Raises:
        MediaError: A JPEG has no end-of-image marker after its first scan, the pixels of a PNG
            have a wrong checksum, or the pixels of a WebP or an AVIF end in zeros.
    """
    if kind in ("JPEG", "MPO"):
        _check_jpeg(data)
    elif kind == "PNG":
        _check_png(data)
    elif kind == "WEBP":
        _check_zeros(data, _webp_ends(data, 12))
    elif kind == "AVIF":
        _check_zeros(data, _avif_ends(data))


def _check_jpeg(data: bytes) -> None:
    position = 2
    # Segments before the pixels may hold a thumbnail, which has an end-of-image marker of its own.
    while segment := _JPEG_MARKER.search(data, position):
        position = segment.end()
        marker = segment[1][0]
        if marker == 0xDA:  # start of scan
            if data.find(b"\xff\xd9", position) < 0:
                raise MediaError("decode", "truncated file")
            return
        if marker != 0x01 and not 0xD0 <= marker <= 0xD8:  # markers without a length
            position += int.from_bytes(data[position : position + 2], "big")


def _check_png(data: bytes) -> None:
    position, view = 8, memoryview(data)
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if kind == b"IDAT":
            if end + 4 > len(data):
                raise MediaError("decode", "truncated file")
            if zlib.crc32(view[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
                raise MediaError("decode", "pixels with a wrong checksum")
        position = end + 4


def _check_zeros(data: bytes, ends: Iterator[int]) -> None:
    for end in ends:
        if data[:end].endswith(bytes(_MOST_ZEROS)):
            raise MediaError("decode", "truncated file")


def _webp_ends(data: bytes, position: int) -> Iterator[int]:
    """Yield the end of the compressed pixels of the first frame, from the chunk at a position."""
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, position)
        position += 8
        if kind in (b"VP8 ", b"VP8L"):
            yield position + length
            return
        position += 16 if kind == b"ANMF" else length + length % 2  # a frame contains chunks


def _avif_ends(data: bytes) -> Iterator[int]:
    """Yield the ends of the boxes of compressed data at the top level."""
    position = 0
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if length == 1 and position + 16 <= len(data):  # a length of 64 bits follows
            length = int.from_bytes(data[position + 8 : position + 16], "big")
        end = position + length if length else len(data)
        if kind == b"mdat":
            yield end
        if end < position + 8:
            return
        position = end
