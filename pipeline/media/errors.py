"""Errors of media files: one short reason for each kind of fault, so that faults can be counted."""

import re
from collections.abc import Iterator
from contextlib import contextmanager


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


@contextmanager
def media_errors() -> Iterator[None]:
    """Convert the system's errors on reading into a :class:`MediaError`."""
    try:
        yield
    except FileNotFoundError:
        raise MediaError("read", "file not found") from None
    except PermissionError:
        raise MediaError("read", "no permission to read the file") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise MediaError("read", one_line(error)) from None


def one_line(error: BaseException) -> str:
    """Return the type and the message of an error in one line of at most 160 characters."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    kind = type(error).__name__
    return f"{kind}: {text}"[:160] if text else kind
