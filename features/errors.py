"""The exception for mistakes that the user can correct."""

_MOST_NAMES = 24  # a warehouse can hold thousands of runs; the latest are named


class UserError(ValueError):
    """A mistake in the user's input: one line with the value, the place and the remedy.

    The command line prints the line and ends with exit code 2; it never shows a traceback for it.
    """


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
