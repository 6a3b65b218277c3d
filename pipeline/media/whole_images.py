"""Refuse encoded images of which a part is missing or damaged although decoders accept them.

A download that breaks off may leave a file of the full size whose rest is zeros, and one of several
parts may leave zeros in the middle. JPEG has a marker at the end and PNG has checksums. WebP and
AVIF have neither, but their compressed pixels do not end in many zeros.

Repair programs append the end marker to a JPEG that was cut. It may lack scans, which the headers
of its scans show. If its only scan was cut, decoders make all blocks after the cut of one colour.
:func:`check_rows` decodes such an image a second time, with bytes added before the marker: they
change no pixel of a whole image, and become blocks of one that was cut. A progressive JPEG that was
cut within its last scan is accepted: it has all of its blocks, some with less detail.

Zeros in the middle of a JPEG are known by its Huffman tables. Zeros encode the first symbol of a
table again and again. If that is not "end of block" for the coefficients of a component, whole
blocks of one coefficient would follow each other, which no image has. Progressive JPEGs and many
JPEGs with optimised tables encode plain areas as zeros, so zeros in them are accepted.
"""

import io
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
_START_OF_SCAN, _HUFFMAN_TABLES, _END_OF_IMAGE = 0xDA, 0xC4, b"\xff\xd9"
_SEQUENTIAL = (0xC0, 0xC1)
"""Markers of frames that are sequential, with Huffman tables."""
_PROGRESSIVE = (0xC2, 0xCA)
"""Markers of frames that are progressive, with Huffman tables and with arithmetic coding."""
_BLOCK = 8  # side of a block of JPEG in pixels
_ADDED = bytes(range(1, 255)) * 4
"""Bytes that are added to a scan of a JPEG; none is 255, with which markers begin."""
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
        MediaError: A JPEG has no end-of-image marker after its first scan, zeros for pixels that
            its tables cannot mean, or too few scans; the pixels of a PNG have a wrong checksum; or
            the pixels of a WebP or an AVIF end in zeros.
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
    frame, components, first_symbols = 0, b"", dict[int, int]()
    for marker, position in _jpeg_segments(data):
        if marker == _START_OF_SCAN:
            end = data.find(_END_OF_IMAGE, position)
            if end < 0:
                raise MediaError("decode", "truncated file")
            zeros = data.find(bytes(_MOST_JPEG_ZEROS), position + 12, end)
            is_pixels = zeros >= 0 and _SCAN_END.search(data, position, zeros) is None
            is_sequential = frame in _SEQUENTIAL
            if is_pixels and is_sequential and _excludes_zeros(data[position:end], first_symbols):
                raise MediaError("decode", "zeros in place of pixels")
            if _lacks_scans(data, position - 2, frame in _PROGRESSIVE, components):
                raise MediaError("decode", "truncated file")
        elif marker == _HUFFMAN_TABLES:
            length = int.from_bytes(data[position : position + 2], "big")
            first_symbols |= _first_symbols(data[position + 2 : position + length])
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC8, 0xCC):
            frame = marker
            n_components = int.from_bytes(data[position + 7 : position + 8], "big")
            components = data[position + 8 : position + 8 + 3 * n_components : 3]


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the marker of each segment up to the first scan, and the offset of its length.

    Segments before the pixels may hold a thumbnail, which has an end-of-image marker of its own.
    """
    position, marker = 2, 0
    while marker != _START_OF_SCAN and (segment := _JPEG_MARKER.search(data, position)):
        position, marker = segment.end(), segment[1][0]
        if marker != 0x01 and not 0xD0 <= marker <= 0xD8:  # markers without a length
            yield marker, position
            position += int.from_bytes(data[position : position + 2], "big")


def _lacks_scans(data: bytes, position: int, is_progressive: bool, components: bytes) -> bool:
    """Return whether a coefficient of a JPEG has no scan with its last bit.

    Args:
        data: The encoded image.
        position: Offset of the first start-of-scan marker.
        is_progressive: A scan holds some of the coefficients, or some of their bits.
        components: Identifier of each component of the frame.
    """
    complete = set[tuple[int, int]]()  # component and coefficient
    while segment := _SCAN_END.search(data, position):
        position, marker = segment.end(), data[segment.end() - 1]
        if marker == _END_OF_IMAGE[1]:
            break
        length = int.from_bytes(data[position : position + 2], "big")
        header = data[position + 2 : position + length]
        if marker == _START_OF_SCAN and len(header) >= 4 + 2 * header[0]:
            first, last, bits = header[-3:] if is_progressive else (0, 63, 0)
            if bits & 0x0F == 0:
                names = header[1 : 1 + 2 * header[0] : 2]
                complete |= {(name, index) for name in names for index in range(first, last + 1)}
        position += length
    return any((name, index) not in complete for name in components for index in range(64))


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


def check_rows(image: Image.Image, data: bytes, draft: int | None = None) -> None:
    """Refuse an image whose compressed pixels end before its last row.

    Pillow leaves the rest of a PNG black, and the rest of a JPEG in one colour.

    Args:
        image: The decoded image. Only a PNG whose last row is black, or that is interlaced, and a
            JPEG whose last block has one colour are read a second time.
        data: The encoded image.
        draft: As the image was decoded, see :func:`pipeline.media.images.decode_image`.

    Raises:
        MediaError: The compressed pixels of a PNG or a JPEG are fewer than its header says.
    """
    if image.format == "PNG":
        _check_last_row(image, data)
    elif image.format in ("JPEG", "MPO") and "progressive" not in image.info:
        _check_last_block(image, data, draft)


def _check_last_block(image: Image.Image, data: bytes, draft: int | None) -> None:
    width, height = image.size
    corner = ((width - 1) // _BLOCK * _BLOCK, (height - 1) // _BLOCK * _BLOCK, width, height)
    if len(image.crop(corner).getcolors() or ()) != 1:
        return
    *_, (_, scan) = _jpeg_segments(data)
    end = data.find(_END_OF_IMAGE, scan)
    with Image.open(io.BytesIO(data[:end] + _ADDED + data[end:]), formats=("JPEG",)) as longer:
        if draft is not None:
            longer.draft(None, (draft, draft))
        longer.load()
        if longer.tobytes() != image.tobytes():
            raise MediaError("decode", "truncated file")


def _check_last_row(image: Image.Image, data: bytes) -> None:
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
