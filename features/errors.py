"""The exceptions that end a command with one line."""

from typing import ClassVar

_MOST_NAMES = 40  # a warehouse can hold thousands of runs; the latest are named
ALLOW_READING = "change its permissions (chmod) or its owner (chown)"
_LONGEST_NAME = 120  # characters of an unknown name that a message repeats


class UserError(ValueError):
    """A mistake in the user's input: one line with the value, the place and the remedy.

    The command line prints the line and ends with :attr:`exit_code`; it never shows a traceback for
    it.
    """

    exit_code: ClassVar[int] = 2
    """Exit code of the command line."""
    is_reported: bool = False
    """True in the processes of a group in which another process prints the line."""


class OutOfMemoryError(UserError):
    """The machine has too little memory: one line with the value, the place and the remedy."""

    exit_code = 1


class NoPermissionError(UserError):
    """A file or folder that this user may not read: one line with the path and the remedy."""


class DamagedError(UserError):
    """A file of the warehouse is damaged: one line with the file, the reason and the remedy."""


def shorten(text: str, most: int) -> str:
    """Return a text of at most about ``most`` characters: the middle of a longer one is left out.

    Examples:
        >>> shorten("a" * 500, 20)
        'aaaaaaaaaa[480 characters left out]aaaaaaaaaa'
    """
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}[{len(text) - 2 * half:,} characters left out]{text[-half:]}"


def unknown(kind: str, value: str, known: list[str]) -> UserError:
    """Return the error for an unknown name.

    Args:
        kind: Kind of the name, such as ``"backbone"``.
        value: The unknown name.
        known: The names that exist, the ones most likely meant at the end.
    """
    shown = ", ".join(known[-_MOST_NAMES:]) or "none yet"
    rest = f", and {len(known) - _MOST_NAMES} more" if len(known) > _MOST_NAMES else ""
    return UserError(f"unknown {kind} {shorten(value, _LONGEST_NAME)!r}; known: {shown}{rest}")


def no_permission(place: object) -> UserError:
    """Return the error for a file or folder that this user may not read."""
    return NoPermissionError(f"{place}: no permission to read it; {ALLOW_READING}")
