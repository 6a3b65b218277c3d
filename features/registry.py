"""Registries: the choices that users type, from this project and from installed packages."""

import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import lru_cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import Any, Generic, TypeVar

from features.errors import UserError, unknown

T = TypeVar("T")

OWN = "mmrec"
"""Origin of the entries that this project brings itself."""


class Registry(MutableMapping[str, T], Generic[T]):
    """A mapping from the names of one kind of thing to their entries.

    The entries of this project are given as a dictionary. Installed packages add entries through
    an entry point group; the group is read at the first look-up. An entry point refers to an
    object of the entry's class::

        [project.entry-points."mmrec.models"]
        fpmc = "my_package.entries:FPMC"

    A package that cannot be used is left out and listed in :attr:`broken`.

    Args:
        kind: What the entries are, in the singular, as error messages call them.
        entries: Name to entry.
        group: Entry point group, or empty if packages cannot add entries.
        convert: Function that turns the object of an entry point into an entry; an error of the
            function makes the entry point a broken one. None takes the object as it is.
        base: Class that the entries inherit from, if the entries are classes.

    Examples:
        >>> colours = Registry("colour", {"red": 0xFF0000})
        >>> colours.find("red") == 0xFF0000
        True
        >>> colours.find("rot")
        Traceback (most recent call last):
        ...
        features.errors.UserError: unknown colour 'rot'; known: red
    """

    def __init__(
        self,
        kind: str,
        entries: Mapping[str, T],
        *,
        group: str = "",
        convert: Callable[[object], object] | None = None,
        base: type | None = None,
    ) -> None:
        self.kind = kind
        self.group = group
        self._convert = convert
        self._base = base
        self._entries = dict(entries)
        self._origins = dict.fromkeys(self._entries, OWN)
        self._broken: dict[str, str] = {}
        self._is_complete = not group

    def find(self, name: str) -> T:
        """Return the entry of a name.

        Raises:
            UserError: No entry has the name, or its package cannot be used.
        """
        self._complete()
        if name in self._broken and name not in self._entries:
            raise UserError(f"{self.kind} {name!r} cannot be used: {self._broken[name]}")
        if name not in self._entries:
            raise unknown(self.kind, name, list(self._entries))
        return self._entries[name]

    def origin(self, name: str) -> str:
        """Return the name and version of the package that an entry comes from."""
        self._complete()
        return self._origins[name]

    @property
    def broken(self) -> dict[str, str]:
        """Name of each entry point that cannot be used, and the reason."""
        self._complete()
        return dict(self._broken)

    def __getitem__(self, name: str) -> T:
        self._complete()
        return self._entries[name]

    def __setitem__(self, name: str, entry: T) -> None:
        self._complete()
        self._entries[name] = entry
        self._origins[name] = OWN

    def __delitem__(self, name: str) -> None:
        self._complete()
        del self._entries[name], self._origins[name]

    def __iter__(self) -> Iterator[str]:
        self._complete()
        return iter(self._entries)

    def __len__(self) -> int:
        self._complete()
        return len(self._entries)

    def _complete(self) -> None:
        """Add the entries of installed packages, once."""
        if self._is_complete:
            return
        self._is_complete = True
        points = _entry_point_selector(tuple(sys.path))(group=self.group)
        for point in sorted(points, key=lambda point: point.name):
            origin = _origin(point)
            if point.name in self._entries:
                taken = self._origins[point.name]
                self._broken[point.name] = f"{origin} uses a name that {taken} has already"
                continue
            try:
                loaded = point.load()
                entry: Any = loaded if self._convert is None else self._convert(loaded)
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                self._broken[point.name] = f"{point.value} of {origin} cannot be loaded ({reason})"
                continue
            if not self._fits(entry):
                self._broken[point.name] = (
                    f"{point.value} of {origin} is {entry!r:.80}, not {self._expected()}"
                )
                continue
            self._entries[point.name] = entry
            self._origins[point.name] = origin

    def _fits(self, entry: object) -> bool:
        if self._base is not None:
            return isinstance(entry, type) and issubclass(entry, self._base)
        return type(entry) in {type(known) for known in self._entries.values()}

    def _expected(self) -> str:
        if self._base is not None:
            return f"a subclass of {self._base.__name__}"
        names = {type(known).__name__ for known in self._entries.values()}
        return f"of type {' or '.join(sorted(names))}"


@lru_cache(maxsize=1)
def _entry_point_selector(path: tuple[str, ...]) -> Callable[..., EntryPoints]:
    """Return the selection of entry points on an import path, read once for all registries."""
    return entry_points().select


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unnamed package"
