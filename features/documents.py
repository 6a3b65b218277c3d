"""JSON and TOML documents of a warehouse, written whole and with a checksum."""

import json
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from features.checksums import EMPTY_CHECKSUM, ChangedBytesError, seal, verify
from features.errors import DamagedError, UserError, no_permission

_KEY = "checksum"


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write one JSON document, complete or not at all; the entry ``checksum`` is added."""
    assert _KEY not in document
    document = {_KEY: EMPTY_CHECKSUM, **document}
    _write(path, json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path, remedy: str) -> Any:
    """Read one JSON document, without the entry ``checksum``.

    Raises:
        DamagedError: The file cannot be read, has changed since it was written, or is not JSON.
    """
    with _document_errors(path, remedy, f"the entry {_KEY}"):
        verify(path)
        document = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(document, dict):
        document.pop(_KEY, None)
    return document


def write_toml(path: Path, document: Mapping[str, Any]) -> None:
    """Write one TOML document, complete or not at all; its first line holds the checksum."""
    first = f"# {EMPTY_CHECKSUM} is the checksum of this file; remove this line if you edit it"
    _write(path, f"{first}\n\n{tomli_w.dumps(document)}")


def read_toml(path: Path, remedy: str) -> dict[str, Any]:
    """Read one TOML document.

    Raises:
        DamagedError: The file cannot be read, has changed since it was written, or is not TOML.
    """
    with _document_errors(path, remedy, "its first line"):
        verify(path)
        return tomllib.loads(path.read_text(encoding="utf-8"))


def read_user_toml(path: Path) -> dict[str, Any]:
    """Read a TOML document that a user has written; it has no checksum.

    Raises:
        UserError: The file cannot be read, is a named pipe, or is not TOML.
    """
    # A named pipe without a writer never ends. The shell's <(...) is a pipe that has a writer.
    if path.is_fifo() and path.parent != Path("/dev/fd"):
        raise UserError(f"{path} is a named pipe; give a TOML file")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except PermissionError:
        raise no_permission(path) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a TOML file") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deep; divide it into tables") from None
    except ValueError as error:  # also bytes that are not UTF-8, and integers of too many digits
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not TOML: {reason}; correct the file") from None


def _write(path: Path, text: str) -> None:
    from features.atomic_files import atomic_write  # imports DuckDB; reading does not need it

    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        seal(temporary)


@contextmanager
def _document_errors(path: Path, remedy: str, place: str) -> Iterator[None]:
    """Turn any error on reading a document into one line with a remedy.

    Args:
        path: The document.
        remedy: What to do if the document is damaged.
        place: Place of the checksum, for a user who has edited the document.
    """
    try:
        yield
    except PermissionError:
        raise no_permission(path) from None
    except ChangedBytesError as error:
        raise DamagedError(
            f"{path} is damaged ({error}); {remedy}; if you edited it, remove {place}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DamagedError(f"{path} is damaged ({reason}); {remedy}") from None
