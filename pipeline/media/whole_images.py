"""Refuse encoded images of which a part is missing or damaged although decoders accept them.

A download that breaks off may leave a file of the full size whose rest is zeros, and one of several
parts may leave zeros in the middle. JPEG has a marker at the end and PNG has checksums. WebP and
AVIF have neither, but their compressed pixels do not end in many zeros.

Zeros in the middle of a JPEG are known by its Huffman tables. Zeros encode the first symbol of a
table again and again. If that is not "end of block" for the coefficients of a component, whole
blocks of one coefficient would follow each other, which no image has. Progressive JPEGs and many
JPEGs with optimised tables encode plain areas as zeros, so zeros in them are accepted.
"""

import re
import struct
import zlib
from collections.abc import Iterator, Mapping

from PIL import Image

from pipeline.media.errors import MediaError

_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff])")
_SCAN_END = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")
_MOST_JPEG_ZEROS = 256
"""Bytes of zeros between the pixels of a JPEG from which on they are taken as missing."""
_SEQUENTIAL = (0xC0, 0xC1)
"""Markers of frames that are sequential, with Huffman tables."""
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Colour type of a PNG to its number of channels."""
_INTERLACED = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
    (0, 1, 1, 2),
)  # fmt: skip
"""The passes of an interlaced PNG: first column and row, and the steps to the next ones."""
_MOST_INFLATED = 1 << 20  # bytes decompressed at a time
_MOST_ZEROS = 1024
"""Bytes of zeros at the end of compressed pixels from which on the end is taken as missing."""


def check_whole(kind: str | None, data: bytes) -> None:
    """Refuse an encoded image whose end is missing or damaged.

    Args:
        kind: Format of the image by the name that Pillow gives it; most formats are not checked.
        data: The encoded image.

    Raises:
        MediaError: A JPEG has no end-of-image marker after its first scan, or zeros for pixels
            that its tables cannot mean; the pixels of a PNG have a wrong checksum; or the pixels
            of a WebP or an AVIF end in zeros.
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
    position, frame, first_symbols = 2, 0, dict[int, int]()
    # Segments before the pixels may hold a thumbnail, which has an end-of-image marker of its own.
    while segment := _JPEG_MARKER.search(data, position):
        position = segment.end()
        marker = segment[1][0]
        if marker == 0xDA:  # start of scan
            end = data.find(b"\xff\xd9", position)
            if end < 0:
                raise MediaError("decode", "truncated file")
            zeros = data.find(bytes(_MOST_JPEG_ZEROS), position + 12, end)
            is_pixels = zeros >= 0 and _SCAN_END.search(data, position, zeros) is None
            is_sequential = frame in _SEQUENTIAL
            if is_pixels and is_sequential and _excludes_zeros(data[position:end], first_symbols):
                raise MediaError("decode", "zeros in place of pixels")
            return
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame = marker
        if marker != 0x01 and not 0xD0 <= marker <= 0xD8:  # markers without a length
            length = int.from_bytes(data[position : position + 2], "big")
            if marker == 0xC4:
                first_symbols |= _first_symbols(data[position + 2 : position + length])
            position += length


def _first_symbols(tables: bytes) -> dict[int, int]:
    """Return the symbol whose code is all zeros for each Huffman table, by class and number."""
    symbols, position = dict[int, int](), 0
    while position + 17 < len(tables):
        symbols[tables[position]] = tables[position + 17]
        position += 17 + sum(tables[position + 1 : position + 17])
    return symbols


def _excludes_zeros(scan: bytes, first_symbols: Mapping[int, int]) -> bool:
    """Return whether zeros cannot be the plain blocks of a scan, which begins with its length."""
    components = scan[3 : 3 + 2 * scan[2]] if len(scan) > 2 else b""
    tables = (0x10 | table & 0x0F for table in components[1::2])
    return any(first_symbols.get(table, 0) != 0 for table in tables)


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


def check_rows(image: Image.Image, data: bytes) -> None:
    """Refuse a PNG whose compressed pixels end before its last row; Pillow leaves the rest black.

    Args:
        image: The decoded image. Only an image whose last row is black, or that is interlaced,
            is read a second time.
        data: The encoded image.

    Raises:
        MediaError: The compressed pixels of a PNG are fewer than its header says.
    """
    if image.format != "PNG":
        return
    width, height, depth, colour, _, _, interlace = struct.unpack_from(">IIBBBBB", data, 16)
    last_row = image.crop((0, height - 1, width, height))
    if not interlace and last_row.getbbox(alpha_only=False) is not None:
        return
    bits = depth * _CHANNELS.get(colour, 1)
    expected = sum(
        -(-(height - top) // down) * (1 + -(-(-(-(width - left) // across) * bits) // 8))
        for left, top, across, down in (_INTERLACED if interlace else ((0, 0, 1, 1),))
        if left < width and top < height
    )
    if sum(_inflated_lengths(data)) < expected:
        raise MediaError("decode", "truncated file")


def _inflated_lengths(data: bytes) -> Iterator[int]:
    """Yield the lengths of the pieces of the decompressed pixels of a PNG."""
    position, stream = 8, zlib.decompressobj()
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        rest = data[position + 8 : position + 8 + length] if kind == b"IDAT" else b""
        while rest:
            yield len(stream.decompress(rest, _MOST_INFLATED))
            rest = stream.unconsumed_tail
        position += 12 + length


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
