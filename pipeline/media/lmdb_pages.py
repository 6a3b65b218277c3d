"""Read an LMDB page by page, so that a truncated or damaged file is an error.

The library of LMDB maps the file into memory and trusts its pages. A page past the end of a
truncated file then kills the process with SIGBUS, and a damaged page can kill it with SIGSEGV. This
module reads the same B+ tree with ``pread`` and checks every offset. The layout is that of
``mdb.c`` in LMDB 0.9 (data version 1) on 64-bit little-endian machines.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.media.errors import ContainerError, container_error

_MAGIC, _VERSION = 0xBEEFC0DE, 1
# Of a page with a meta record: magic, version, page size, flags of the main table, its depth, its
# root page, last page of the file, transaction.
_META = struct.Struct("<16x II 16x I 44x 4x HH 32x Q QQ")
_HEADER = struct.Struct(
    "<Q 2x HHH"
)  # of a page: its number, flags, end and start of its free space
_NODE = struct.Struct("<HHHH")  # low and high half of a size or page, flags, size of the key
_BRANCH, _LEAF, _OVERFLOW = 1, 2, 4
_BIG_VALUE, _PLAIN_VALUE = 1, 0
_NO_PAGE = (1 << 64) - 1
_MAX_DEPTH = 32


class _Meta(NamedTuple):
    """One of the two records that describe the tree; the newer one counts."""

    transaction: int
    page_size: int
    flags: int
    depth: int
    root: int
    last_page: int


class _Node(NamedTuple):
    """One key of a page with the place of its child page or of its value."""

    key: bytes
    child: int
    """Number of the child page, in a branch page."""
    flags: int
    value: tuple[int, int]
    """Offset in the page and size of the value, in a leaf page."""


class LmdbPages:
    """The main table of one LMDB, open for reading. Threads may read concurrently.

    Args:
        path: The LMDB: a folder, or a single file.

    Raises:
        ContainerError: The file cannot be opened, is not an LMDB, has duplicate or integer keys, or
            ends before a page that is in use.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path / "data.mdb" if path.is_dir() else path, os.O_RDONLY)
        except OSError as error:
            raise container_error(path, "LMDB", error) from None
        try:
            self._size = os.fstat(self._file).st_size
            self._meta = self._newer_meta()
            # LMDB does not write pages at the end that were freed at once, so that a whole file may
            # be shorter than its last page number says. It always has both pages of meta records.
            is_short = self._size < self._claimed_size()
            has_metas = self._size >= 2 * self._meta.page_size
            if is_short and (not has_metas or any(end > self._size for end in self._ends())):
                raise self._truncated()
        except BaseException:
            os.close(self._file)
            raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def plain_keys(self) -> Iterator[bytes]:
        """Yield every key with a plain value, in the order of the file.

        Raises:
            ContainerError: A page of the tree is damaged, or the file has named tables only.
        """
        has_values, table = False, b""
        for _, node in self._leaf_nodes():
            if node.flags in (_PLAIN_VALUE, _BIG_VALUE):
                has_values = True
                yield node.key
            else:
                table = node.key
        if table and not has_values:
            raise self._names_table(table)

    def find(self, key: bytes) -> tuple[int, int] | None:
        """Return the offset in the file and the size of the value of a key; None if it is missing.

        Raises:
            ContainerError: A page on the way is damaged.
        """
        if self._meta.root == _NO_PAGE:
            return None
        number = self._meta.root
        for _ in range(self._meta.depth):
            page, is_leaf, count = self._tree_page(number)
            # The first key of a branch page is empty and stands for every smaller key.
            low, high = (0 if is_leaf else 1), count
            while low < high:
                middle = (low + high) // 2
                if self._node(page, number, middle, is_leaf).key <= key:
                    low = middle + 1
                else:
                    high = middle
            if is_leaf:
                if low == 0:
                    return None
                node = self._node(page, number, low - 1, is_leaf)
                return self._value(page, number, node) if node.key == key else None
            number = self._node(page, number, low - 1, is_leaf).child
        raise self._damaged(number)

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes at an offset of the file.

        Raises:
            ContainerError: The file ends before.
        """
        data = os.pread(self._file, size, offset)
        if len(data) < size:
            raise self._truncated()
        return data

    def _newer_meta(self) -> _Meta:
        first = self._read_meta(0)
        second = self._read_meta(first.page_size) if first else None
        metas = [meta for meta in (first, second) if meta is not None]
        if not metas:
            raise container_error(self.path, "LMDB", ValueError("no valid header"))
        meta = max(metas)
        if meta.flags:
            raise ContainerError(
                f"{self.path} is an LMDB with duplicate, reversed or integer keys; write one with"
                " the item ids as plain keys",
                "an LMDB without plain keys",
            )
        return meta

    def _read_meta(self, offset: int) -> _Meta | None:
        data = os.pread(self._file, _META.size, offset)
        if len(data) < _META.size:
            return None
        magic, version, size, flags, depth, root, last, transaction = _META.unpack(data)
        is_valid = (
            (magic, version) == (_MAGIC, _VERSION)
            and 256 <= size <= 65_536
            and size & (size - 1) == 0
            and depth <= _MAX_DEPTH
            and (root == _NO_PAGE or root <= last < 1 << 47)
        )
        return _Meta(transaction, size, flags, depth, root, last) if is_valid else None

    def _ends(self) -> Iterator[int]:
        """Yield the end of every page and value that is in use, as an offset in the file."""
        size = self._meta.page_size
        for number in self._page_numbers():
            yield (number + 1) * size
            if (number + 1) * size > self._size:
                return
            page, is_leaf, count = self._tree_page(number)
            for index in range(count if is_leaf else 0):
                node = self._node(page, number, index, is_leaf)
                if node.flags == _BIG_VALUE:
                    first = self._first_overflow_page(page, number, node)
                    yield first * size + _HEADER.size + node.value[1]

    def _page_numbers(self) -> Iterator[int]:
        """Yield the pages of the tree from left to right, a parent before its children."""
        pending = [] if self._meta.root == _NO_PAGE else [(self._meta.root, 1)]
        visited: set[int] = set()
        while pending:
            number, depth = pending.pop()
            # A damaged tree may have a circle.
            if number in visited or depth > self._meta.depth:
                raise self._damaged(number)
            visited.add(number)
            yield number
            page, is_leaf, count = self._tree_page(number)
            if not is_leaf:
                nodes = (self._node(page, number, index, is_leaf) for index in range(count))
                pending += [(node.child, depth + 1) for node in nodes][::-1]

    def _leaf_nodes(self) -> Iterator[tuple[bytes, _Node]]:
        """Yield (page, node) of every key."""
        for number in self._page_numbers():
            page, is_leaf, count = self._tree_page(number)
            for index in range(count if is_leaf else 0):
                yield page, self._node(page, number, index, is_leaf)

    def _tree_page(self, number: int) -> tuple[bytes, bool, int]:
        """Return a page, whether it is a leaf, and the number of its keys."""
        if not 2 <= number <= self._meta.last_page:
            raise self._damaged(number)
        page = self.read(number * self._meta.page_size, self._meta.page_size)
        stored, flags, lower, upper = _HEADER.unpack_from(page)
        kind = flags & (_BRANCH | _LEAF)
        count = (lower - _HEADER.size) // 2
        if (
            stored != number
            or kind not in (_BRANCH, _LEAF)
            or not _HEADER.size <= lower <= upper <= len(page)
            or (kind == _BRANCH and count == 0)
        ):
            raise self._damaged(number)
        return page, kind == _LEAF, count

    def _node(self, page: bytes, number: int, index: int, is_leaf: bool) -> _Node:
        (start,) = struct.unpack_from("<H", page, _HEADER.size + 2 * index)
        if start + _NODE.size > len(page):
            raise self._damaged(number)
        low, high, flags, key_size = _NODE.unpack_from(page, start)
        place = start + _NODE.size + key_size
        size = low | high << 16
        in_page = (8 if flags & _BIG_VALUE else size) if is_leaf else 0
        if place + in_page > len(page):
            raise self._damaged(number)
        key = page[start + _NODE.size : place]
        return _Node(key, size | flags << 32, flags if is_leaf else 0, (place, size))

    def _value(self, page: bytes, number: int, node: _Node) -> tuple[int, int]:
        place, size = node.value
        if node.flags == _PLAIN_VALUE:
            return number * self._meta.page_size + place, size
        if node.flags != _BIG_VALUE:
            raise self._names_table(node.key)
        first = self._first_overflow_page(page, number, node)
        offset = first * self._meta.page_size
        stored, flags, _, _ = _HEADER.unpack(self.read(offset, _HEADER.size))
        if stored != first or not flags & _OVERFLOW:
            raise self._damaged(first)
        return offset + _HEADER.size, size

    def _first_overflow_page(self, page: bytes, number: int, node: _Node) -> int:
        (first,) = struct.unpack_from("<Q", page, node.value[0])
        pages = -(-(_HEADER.size + node.value[1]) // self._meta.page_size)
        if first < 2 or first + pages - 1 > self._meta.last_page:
            raise self._damaged(number)
        return int(first)

    def _claimed_size(self) -> int:
        return (self._meta.last_page + 1) * self._meta.page_size

    def _names_table(self, key: bytes) -> ContainerError:
        return ContainerError(
            f"{self.path}: {key[:40]!r} names a table, not an image; write the images into the"
            " main table",
            "no such key in the LMDB",
        )

    def _truncated(self) -> ContainerError:
        return ContainerError(
            f"{self.path} is truncated: {self._size:,} of {self._claimed_size():,} bytes;"
            " copy it again",
            "truncated LMDB",
        )

    def _damaged(self, number: int) -> ContainerError:
        return ContainerError(
            f"{self.path} is damaged at page {number:,}; copy it again", "damaged LMDB"
        )
