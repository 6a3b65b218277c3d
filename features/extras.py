"""Optional packages, which the extras of the distribution install (``mmrec[map]``)."""

from importlib.util import find_spec

from features.errors import UserError


def require_extra(user: str, module: str, distribution: str, extra: str) -> None:
    """Check that an optional package is installed; it is not imported.

    Args:
        user: What needs the package, for messages, such as ``--track wandb``.
        module: Name of the package in Python.
        distribution: Name of the package in the package index.
        extra: Extra of mmrec that installs it.

    Raises:
        UserError: The package is not installed; the line names the extra.
    """
    if find_spec(module) is None:
        raise UserError(
            f"{user} needs the package {distribution}, which is not installed; run:"
            f" pip install 'mmrec[{extra}]'"
        )
