"""Read images from an LMDB as NineRec, MoRec and PMMRec release them: pickled raw pixels.

A pickle is a program: unpickling untrusted data would run it. This module does not unpickle. It
interprets as data the few instructions that such an image needs, on a stack of numbers, strings,
bytes, tuples and dicts. Any other instruction is refused before it has an effect.
"""

import io
import pickletools
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from PIL import Image

from features.errors import UserError
from pipeline.media.errors import ContainerError
from pipeline.media.lmdb_pages import LmdbPages

CLASS = "LMDB_Image"
MAX_LMDB_PIXELS = 178_956_970
"""Size limit of one image: Pillow's own limit against decompression bombs."""
MAX_LMDB_INSTRUCTIONS = 1_000
"""Limit of the instructions of one pickle; the pickles of the releases have about thirty."""
MAX_LMDB_TEXT_BYTES = 65_536
"""Limit of one text of a pickle, such as the name of an attribute or the id of the item."""
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class LmdbImages:
    """One LMDB of images, open for reading. Threads may read concurrently.

    Args:
        path: The LMDB: a folder, or a single file.

    Raises:
        ContainerError: The path is not a readable LMDB.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pages = LmdbPages(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the LMDB."""
        self._pages.close()

    def keys(self) -> Iterator[str]:
        """Yield every key that can be the id of an item, in the order of the file."""
        for key in self._pages.plain_keys():
            # Some releases store their own lists under __keys__ and __len__.
            if not key.startswith(b"__"):
                yield key.decode("utf-8", "replace")

    def size(self, key: str) -> int:
        """Return the size of one value in bytes.

        Raises:
            ContainerError: The LMDB has no such key, or is damaged on the way to the value.
        """
        return self._find(key)[1]

    def get(self, key: str) -> Image.Image | bytes:
        """Return one image: its pixels, or the encoded bytes if the LMDB holds encoded images.

        Raises:
            ContainerError: The LMDB has no such key, or is damaged on the way to the value.
            UserError: The value is a pickle of anything but an image.
        """
        value = self._pages.read(*self._find(key))
        if not value.startswith(
            b"\x80"
        ):  # the first byte of a pickle since protocol 2, and of no image
            return value
        return read_lmdb_image(value, f"{self.path}#{key}")

    def _find(self, key: str) -> tuple[int, int]:
        extent = self._pages.find(key.encode("utf-8", "surrogateescape"))
        if extent is None:
            raise ContainerError(
                f"{self.path} has no key {key!r}; prepare the dataset again",
                "no such key in the LMDB",
            )
        return extent


def read_lmdb_image(data: bytes, where: str) -> Image.Image:
    """Read a pickled ``LMDB_Image`` (channels, size, image) without unpickling it.

    Args:
        data: The pickle.
        where: Name of the pickle in error messages.

    Raises:
        UserError: The pickle holds anything but one image.
    """
    try:
        state = _interpret(data)
    except _RefusedError as error:
        raise UserError(
            f"{where} is not a pickled {CLASS} ({error}); refused, not loaded"
        ) from None
    channels, size, pixels = (state.get(name) for name in ("channels", "size", "image"))
    if (
        not isinstance(pixels, bytes)
        or type(channels) is not int
        or not isinstance(size, tuple)
        or [type(side) for side in size] != [int, int]
    ):
        raise UserError(f"{where}: a {CLASS} without channels, size or pixels; refused")
    height, width = size
    if (
        channels not in _MODES
        or min(size) < 1
        or height * width > MAX_LMDB_PIXELS
        or height * width * channels != len(pixels)
    ):
        raise UserError(
            f"{where}: {height} x {width} pixels in {channels} channels of 8 bits are not"
            f" {len(pixels)} bytes; refused"
        )
    return Image.frombytes(_MODES[channels], (width, height), pixels)


class _RefusedError(Exception):
    """The pickle contains more than an image needs."""


class _Class(NamedTuple):
    """Placeholder of the class on the stack; nothing is imported."""


class _Instance:
    """Placeholder of the object on the stack: its attributes once they are set."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: dict[str, Any] | None = None


_MARK = object()
_VALUES = frozenset(
    (
        "BININT", "BININT1", "BININT2", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
        "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
    )
)  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
_KNOWN = {*_VALUES, *_CONSTANTS, *_TUPLES} | {
    "PROTO", "FRAME", "MARK", "TUPLE", "EMPTY_DICT", "SETITEM", "SETITEMS", "MEMOIZE", "BINPUT",
    "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "NEWOBJ", "BUILD",
}  # fmt: skip


def _interpret(data: bytes) -> dict[str, Any]:
    """Return the attributes of the one object that a pickle holds."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for number, (name, argument) in enumerate(_instructions(data)):
            if number >= MAX_LMDB_INSTRUCTIONS:
                raise _RefusedError(f"it has more than {MAX_LMDB_INSTRUCTIONS:,} instructions")
            _apply(name, argument, stack, memo)
        (instance,) = stack
    except _RefusedError:
        raise
    except Exception as error:  # a damaged pickle fails in as many ways as there are instructions
        raise _RefusedError(f"damaged: {type(error).__name__}") from None
    if not isinstance(instance, _Instance) or instance.state is None:
        raise _RefusedError(f"it holds a {type(instance).__name__}")
    return instance.state


def _instructions(data: bytes) -> Iterator[tuple[str, Any]]:
    """Yield the name and the argument of each instruction before STOP.

    Arguments of other instructions are not decoded: a long number takes time, and a long text up to
    four times its bytes.
    """
    stream = io.BytesIO(data)
    while True:
        opcode = _OPCODES[stream.read(1).decode("latin-1")]
        if opcode.name == "STOP":
            return
        if opcode.name not in _KNOWN:
            raise _RefusedError(f"it uses the instruction {opcode.name}")
        if _text_size(opcode.name, data, stream.tell()) > MAX_LMDB_TEXT_BYTES:
            raise _RefusedError(f"a text has more than {MAX_LMDB_TEXT_BYTES:,} bytes")
        yield opcode.name, opcode.arg.reader(stream) if opcode.arg else None


def _text_size(name: str, data: bytes, place: int) -> int:
    """Return the number of bytes of the text at a place, 0 for other arguments."""
    if name == "GLOBAL":  # two lines
        line = data.find(b"\n", place)
        end = data.find(b"\n", line + 1)
        return (end if min(line, end) >= 0 else len(data)) - place
    width = {"BINUNICODE": 4, "BINUNICODE8": 8}.get(name, 0)
    return int.from_bytes(data[place : place + width], "little")


def _apply(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    if name in ("PROTO", "FRAME"):
        return
    if name in _VALUES:
        stack.append(argument)
    elif name in _CONSTANTS:
        stack.append(_CONSTANTS[name])
    elif name in _TUPLES:
        count = _TUPLES[name]
        items = tuple(stack[len(stack) - count :])
        del stack[len(stack) - count :]
        stack.append(items)
    elif name == "MARK":
        stack.append(_MARK)
    elif name == "TUPLE":
        stack.append(tuple(_to_mark(stack)))
    elif name == "EMPTY_DICT":
        stack.append({})
    elif name in ("SETITEM", "SETITEMS"):
        flat = _to_mark(stack) if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
        target = stack[-1]
        # A key is hashed, and the hash of a tuple of tuples can be made to take for ever.
        if not isinstance(target, dict) or not all(type(key) is str for key in flat[::2]):
            raise _RefusedError("it sets something else than named attributes")
        target.update(zip(flat[::2], flat[1::2], strict=True))
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name in ("GLOBAL", "STACK_GLOBAL"):
        module, called = (
            argument.split(" ", 1) if name == "GLOBAL" else (stack.pop(-2), stack.pop())
        )
        if type(module) is not str or type(called) is not str:
            raise _RefusedError("it names something without a name")
        if called != CLASS:
            raise _RefusedError(f"it names {module[:40]!r} {called[:40]!r}")
        stack.append(_Class())
    elif name == "NEWOBJ":
        arguments, kind = stack.pop(), stack.pop()
        if not isinstance(kind, _Class) or arguments != ():
            raise _RefusedError("it makes another object")
        stack.append(_Instance())
    elif name == "BUILD":
        state = stack.pop()
        target = stack[-1]
        if not isinstance(target, _Instance) or not isinstance(state, dict):
            raise _RefusedError("it builds another object")
        target.state = state


def _to_mark(stack: list[Any]) -> list[Any]:
    """Remove the last mark and everything above it; return what was above it."""
    mark = max(index for index, value in enumerate(stack) if value is _MARK)
    above = stack[mark + 1 :]
    del stack[mark:]
    return above
