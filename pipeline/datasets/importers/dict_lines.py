"""Files of one dictionary for each line: JSON, or literals of Python as Amazon released in 2014."""

import ast
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from features.errors import UserError, no_permission
from pipeline.datasets.importers.messages import name_others

MAX_LITERAL = 1 << 20  # bytes of a line that is parsed as Python; JSON may have MAX_LINE
MAX_LINE = 64 << 20  # bytes


def open_bytes(path: Path) -> BinaryIO:
    """Open a file that may be compressed by gzip.

    Raises:
        UserError: There is no permission to read the file.
    """
    try:
        if path.suffix.lower() == ".gz":
            return cast(BinaryIO, gzip.open(path, "rb"))
        return path.open("rb")
    except PermissionError:
        raise no_permission(path) from None


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) of the lines that are not blank; numbers start at 1.

    Raises:
        UserError: The compressed file is damaged, or a line is too long.
    """
    with open_bytes(path) as stream:
        number = 0
        try:
            while line := stream.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise UserError(
                        f"{path}, line {number}: a line of more than {MAX_LINE:,} bytes; shorten it"
                    )
                if line.strip():
                    yield number, line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(
                f"{path}, after line {number}: damaged gzip file ({error}); download it again"
            ) from None


def read_dicts(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, dictionary) of each line that is not blank.

    A line is JSON, or a dictionary of Python with single quotes, which is parsed as a literal and
    never evaluated. NaN and infinity of JSON are None.

    Raises:
        UserError: A line is neither, or too long. The lines that are neither are counted first, so
            the error comes after the last line.
    """
    wrong: list[int] = []
    for number, line in read_lines(path):
        value = _parse_json(line)
        if value is None:
            value = _parse_literal(line)
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            wrong.append(number)
        elif not wrong:
            yield number, value
    if wrong:
        raise UserError(
            f"{path}, line {wrong[0]}: neither a JSON object nor a dictionary of Python of at"
            f" most {MAX_LITERAL:,} bytes"
            f"{name_others(len(wrong), [number - 1 for number in wrong[:3]], 'line')}; correct the"
            " lines"
        )


def _parse_json(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"), parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        return None


def _parse_literal(line: bytes) -> Any:
    if len(line) > MAX_LITERAL:
        return None
    try:
        return ast.literal_eval(line.decode("utf-8-sig").strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def to_json(value: Any) -> str:
    """Return a value of a line as JSON in valid UTF-8; infinity is null."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=_plain, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False, default=_plain)
    return valid_text(text)


def valid_text(text: str) -> str:
    """Return the text with ``?`` in place of halves of surrogate pairs, which UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode()


def _plain(value: Any) -> Any:
    """Return a value of Python that JSON does not have as a list or text."""
    return sorted(value, key=repr) if isinstance(value, set) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value
