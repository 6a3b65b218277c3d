"""Fingerprints of contents, 16 bytes for each and no object: the number of items must not show.

numpy's fixed bytes end where only null bytes follow; so do all that are compared here.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

DTYPE = "S16"
_DIGITS = 32  # of a content hash, hexadecimal
_FEW = 64
_VALUE = np.full(256, 255, np.uint8)
_VALUE[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)


def digest(content: str) -> bytes:
    """The bytes of a content hash."""
    return bytes.fromhex(content).rstrip(b"\0")


def digests(column: pa.ChunkedArray) -> npt.NDArray[np.bytes_]:
    """Give content hashes as (R,) fixed bytes; what is none becomes empty, which no content has."""
    proper = pc.equal(pc.binary_length(column), _DIGITS)
    digits = pc.if_else(proper, column, "0" * _DIGITS).cast(pa.binary())
    fixed = digits.cast(pa.binary(_DIGITS)).combine_chunks()
    flat = np.frombuffer(fixed.buffers()[1], np.uint8, len(fixed) * _DIGITS, fixed.offset * _DIGITS)
    values = _VALUE[flat].reshape(-1, _DIGITS)
    values[(values > 15).any(axis=1)] = 0
    found: npt.NDArray[np.bytes_] = (values[:, ::2] << 4 | values[:, 1::2]).view(DTYPE)[:, 0]
    return found


def place(sought: bytes, among: npt.NDArray[np.bytes_]) -> int:
    """Where a fingerprint stands in a sorted array; -1 when it does not."""
    found = int(among.searchsorted(np.bytes_(sought)))
    return found if found < len(among) and among[found] == sought else -1


class Digests:
    """A set that only grows, by open addressing; it moves when there are more than foreseen.

    Args:
        room: How many to foresee, 24 bytes for each.
    """

    def __init__(self, room: int = 0) -> None:
        self._slots = np.zeros(room + room // 2 + _FEW, DTYPE)
        self._count = 0

    def add(self, one: bytes) -> bool:
        """Add a fingerprint; whether it was new."""
        slot = self._slot(one)
        if self._slots[slot]:
            return False
        self._slots[slot] = one
        self._count += 1
        if 4 * self._count > 3 * len(self._slots):
            held = self._slots[self._slots != b""].tolist()
            self._slots = np.zeros(2 * len(self._slots), DTYPE)
            for moved in held:
                self._slots[self._slot(moved)] = moved
        return True

    def _slot(self, one: bytes) -> int:
        """Where it is, or belongs."""
        slot = int.from_bytes(one[:8]) % len(self._slots)
        while (there := self._slots[slot]) and there != one:
            slot = (slot + 1) % len(self._slots)
        return slot
