"""Errors of media files: one short reason for each kind of fault, so that faults can be counted."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from features.errors import UserError

_NO_PERMISSION = "no permission to read the file"


class MediaError(Exception):
    """An input that cannot be used.

    Args:
        stage: The step that failed: ``read``, ``decode`` or ``encode``.
        reason: The cause in one line. The same fault always has the same reason.
    """

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(reason)
        self.stage = stage
        self.reason = reason


class ContainerError(UserError):
    """A tar or an LMDB, or a part of one, that cannot be read.

    Args:
        message: The container, the fault and the remedy in one line.
        reason: The cause without names. The same fault always has the same reason.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def container_error(path: Path, kind: str, error: Exception) -> ContainerError:
    """Return the error for a container of a kind (``tar`` or ``LMDB``) that cannot be opened."""
    if isinstance(error, PermissionError):
        return ContainerError(f"{path}: {_NO_PERMISSION}; change its permissions", _NO_PERMISSION)
    remedy = "copy it again"
    if kind == "tar":
        remedy += ", and unpack a compressed one to a plain .tar"
    return ContainerError(
        f"{path} is not a readable {kind} ({one_line(error)[:100]}); {remedy}",
        f"not a readable {kind}",
    )


@contextmanager
def media_errors() -> Iterator[None]:
    """Convert the system's errors on reading into a :class:`MediaError`."""
    try:
        yield
    except FileNotFoundError:
        raise MediaError("read", "file not found") from None
    except PermissionError:
        raise MediaError("read", _NO_PERMISSION) from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise MediaError("read", one_line(error)) from None


def one_line(error: BaseException) -> str:
    """Return the type and the message of an error in one line of at most 160 characters."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    kind = type(error).__name__
    return f"{kind}: {text}"[:160] if text else kind
