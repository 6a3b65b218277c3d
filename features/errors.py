"""The one exception that means: the user can mend this."""

_MOST_NAMES = 24  # of runs there may be thousands; the latest are named


class UserError(ValueError):
    """A mistake in what the user gave: one line with the value, the place and the remedy.

    The command line prints the line and ends with exit code 2; it never shows a traceback for it.
    """


def unknown(kind: str, value: str, known: list[str]) -> UserError:
    """Build the error for a name that is not in a table.

    Args:
        kind: What the name should have been, such as ``"backbone"``.
        value: What was given.
        known: The names that exist, the ones most likely meant at the end.
    """
    shown = ", ".join(known[-_MOST_NAMES:]) or "none yet"
    more = f", and {len(known) - _MOST_NAMES} more" if len(known) > _MOST_NAMES else ""
    return UserError(f"unknown {kind} {value!r}; known: {shown}{more}")
