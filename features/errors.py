"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in what the user gave: one line with the value, the place and the remedy.

    The command line prints the line and ends with exit code 2; it never shows a traceback for it.
    """


def unknown(kind: str, value: str, known: list[str]) -> UserError:
    """Build the error for a name that is not in a table.

    Args:
        kind: What the name should have been, such as ``"backbone"``.
        value: What was given.
        known: The names that exist.
    """
    return UserError(f"unknown {kind} {value!r}; known: {', '.join(known) or 'none yet'}")
