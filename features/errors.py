"""The exceptions that end a command with one line."""

from typing import ClassVar

_MOST_NAMES = 24  # a warehouse can hold thousands of runs; the latest are named


class UserError(ValueError):
    """A mistake in the user's input: one line with the value, the place and the remedy.

    The command line prints the line and ends with :attr:`exit_code`; it never shows a traceback for
    it.
    """

    exit_code: ClassVar[int] = 2
    """Exit code of the command line."""


class OutOfMemoryError(UserError):
    """The machine has too little memory: one line with the value, the place and the remedy."""

    exit_code = 1


class DamagedError(UserError):
    """A file of the warehouse is damaged: one line with the file, the reason and the remedy."""


def unknown(kind: str, value: str, known: list[str]) -> UserError:
    """Return the error for an unknown name.

    Args:
        kind: Kind of the name, such as ``"backbone"``.
        value: The unknown name.
        known: The names that exist, the ones most likely meant at the end.
    """
    shown = ", ".join(known[-_MOST_NAMES:]) or "none yet"
    rest = f", and {len(known) - _MOST_NAMES} more" if len(known) > _MOST_NAMES else ""
    return UserError(f"unknown {kind} {value!r}; known: {shown}{rest}")


def no_permission(place: object) -> UserError:
    """Return the error for a file or folder that this user may not read."""
    return UserError(f"{place}: no permission to read it; change its permissions")
