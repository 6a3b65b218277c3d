"""Fingerprints of contents, 16 bytes for each and no object: the number of items must not show.

numpy's fixed bytes end where only null bytes follow; so do all that are compared here.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

DTYPE = "S16"
_DIGITS = 32  # of a content hash, hexadecimal
_FRESH = 4096
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
    """A set that only grows: a few that are new, and sorted runs, each longer than the next."""

    def __init__(self) -> None:
        self._fresh: set[bytes] = set()
        self._runs: list[npt.NDArray[np.bytes_]] = []

    def add(self, one: bytes) -> bool:
        """Add a fingerprint; whether it was new."""
        if one in self._fresh or any(place(one, run) >= 0 for run in self._runs):
            return False
        self._fresh.add(one)
        if len(self._fresh) == _FRESH:
            run = np.sort(np.array(list(self._fresh), DTYPE))
            while self._runs and len(self._runs[-1]) <= len(run):
                run = np.sort(np.concatenate([self._runs.pop(), run]))
            self._runs.append(run)
            self._fresh = set()
        return True
