"""Names of indexes with their parameters: ``faiss:ivf,nlist=4096,nprobe=32``.

A name is the kind of an index, followed by parameters. Parameters have the names of FAISS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass


class IndexNameError(ValueError):
    """A name of an index, or a parameter in it, that cannot be used: one line with the remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One parameter of a kind of index."""

    default: Callable[[int, int], int]
    """Function of the number of items and of the dimensions."""
    builds: bool = True
    """False for a parameter of the search alone: the trained index does not depend on it."""
    least: int = 1
    """Smallest value."""
    most: int = 2**24
    """Largest value."""


def _lists(items: int, dim: int) -> int:
    """Return 4 sqrt(N) lists, fewer where a list would have less than 39 items.

    Both numbers are those of FAISS's guidelines.
    """
    return max(1, min(round(4 * math.sqrt(items)), items // 39))


def _probes(items: int, dim: int) -> int:
    return min(max(8, _lists(items, dim) // 64), _lists(items, dim))


def _code_parts(items: int, dim: int) -> int:
    """Return the number of bytes of a code: the largest divisor of D up to D / 4."""
    return max(part for part in range(1, max(1, dim // 4) + 1) if dim % part == 0)


_IVF = {
    "nlist": Parameter(default=_lists),
    "nprobe": Parameter(default=_probes, builds=False),
}
PARAMETERS: dict[str, dict[str, Parameter]] = {
    "faiss:ivf": _IVF,
    "faiss:ivfpq": {
        **_IVF,
        "M": Parameter(default=_code_parts),
        "nbits": Parameter(
            default=lambda items, dim: min(8, max(1, int(math.log2(items)))), most=12
        ),
        "k_factor": Parameter(default=lambda items, dim: 10, builds=False),
    },
    "faiss:hnsw": {
        # FAISS divides by log(M) and ends with a segmentation fault for M = 1.
        "M": Parameter(default=lambda items, dim: 32, least=2, most=512),
        "efConstruction": Parameter(default=lambda items, dim: 80),
        "efSearch": Parameter(default=lambda items, dim: 64, builds=False),
    },
}
"""Kind of each approximate index -> name of each parameter, as in FAISS: number of lists and of
searched lists (``nlist``, ``nprobe``), bytes and bits of a code (``M``, ``nbits``), candidates that
are scored again for each item of a list (``k_factor``), links of an item (``M``), and candidates
while the graph is built and searched (``efConstruction``, ``efSearch``)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexOptions:
    """A kind of index and the given parameters."""

    kind: str
    given: Mapping[str, int]

    @property
    def is_exact(self) -> bool:
        """True if the index gives the same ranks and lists as every exact one."""
        return self.kind not in PARAMETERS

    @classmethod
    def parse(cls, name: str, exact_kinds: Iterable[str]) -> IndexOptions:
        """Return the options of a name.

        Args:
            name: ``KIND`` or ``KIND,PARAMETER=VALUE,...``.
            exact_kinds: The kinds that have no parameters.

        Raises:
            IndexNameError: The kind or a parameter is unknown, or a value is not in its range.

        Examples:
            >>> IndexOptions.parse("faiss:ivf,nprobe=32", ["torch"]).given
            {'nprobe': 32}
        """
        kind, *assignments = [part.strip() for part in name.split(",")]
        known = sorted({*exact_kinds, *PARAMETERS})
        if kind not in known:
            raise IndexNameError(f"unknown index {kind[:80]!r}; known: {', '.join(known)}")
        parameters = PARAMETERS.get(kind, {})
        given: dict[str, int] = {}
        for assignment in assignments:
            key, _, text = assignment.partition("=")
            if key not in parameters:
                takes = f"known: {', '.join(parameters)}" if parameters else "it has none"
                raise IndexNameError(f"index {kind!r}: unknown parameter {key[:80]!r}; {takes}")
            if key in given:
                raise IndexNameError(f"index {kind!r}: {key} is given twice; give it once")
            given[key] = _value(kind, key, text, parameters[key])
        options = cls(kind=kind, given=given)
        if "nlist" in given and given.get("nprobe", 1) > given["nlist"]:
            raise IndexNameError(
                f"index {kind!r}: nprobe={given['nprobe']} is more than nlist={given['nlist']};"
                " give at most as many searched lists as there are lists"
            )
        return options

    def values(self, items: int, dim: int) -> dict[str, int]:
        """Return all parameters for a catalogue: the given ones, and defaults for the others.

        Args:
            items: Number of items N.
            dim: Dimensions D.

        Raises:
            IndexNameError: A parameter does not fit the catalogue.
        """
        values = {
            key: self.given.get(key, parameter.default(items, dim))
            for key, parameter in PARAMETERS.get(self.kind, {}).items()
        }
        if values.get("nlist", 0) > items:
            raise self._misfit("nlist", values, f"the catalogue has {items:,} items", items)
        if "nprobe" in values:
            if "nprobe" in self.given and values["nprobe"] > values["nlist"]:
                raise self._misfit("nprobe", values, f"nlist is {values['nlist']}", values["nlist"])
            values["nprobe"] = min(values["nprobe"], values["nlist"])
        if "nbits" in values:
            if dim % values["M"]:
                raise IndexNameError(
                    f"index {self.kind!r}: M={values['M']} does not divide the {dim} dimensions of"
                    f" the vectors; give a divisor of {dim}, such as {_code_parts(items, dim)}"
                )
            if 2 ** values["nbits"] > items:
                most = int(math.log2(items))
                reason = f"2^nbits is more than the {items:,} items of the catalogue"
                if most < 1:
                    raise IndexNameError(
                        f"index {self.kind!r}: the catalogue has {items} item; give --index faiss"
                    )
                raise self._misfit("nbits", values, reason, most)
        return values

    def check_items(self, items: int) -> None:
        """Check the parameters that depend on the number of items, before there are vectors.

        Raises:
            IndexNameError: A parameter does not fit the catalogue.
        """
        self.values(items, self.given.get("M", 1))  # a width that M divides

    def build_values(self, items: int, dim: int) -> dict[str, int]:
        """Return the parameters on which the trained index depends."""
        parameters = PARAMETERS.get(self.kind, {})
        return {
            key: value for key, value in self.values(items, dim).items() if parameters[key].builds
        }

    def _misfit(
        self, key: str, values: Mapping[str, int], reason: str, most: int
    ) -> IndexNameError:
        return IndexNameError(
            f"index {self.kind!r}: {key}={values[key]} is too large: {reason}; give at most {most}"
        )


def _value(kind: str, key: str, text: str, parameter: Parameter) -> int:
    """Return the value of a parameter."""
    least, most = parameter.least, parameter.most
    is_number = text.isascii() and text.isdigit() and len(text) < 12
    if not is_number or not least <= int(text) <= most:
        raise IndexNameError(
            f"index {kind!r}: {key}={text[:40]!r} is not a whole number from {least} to {most:,};"
            f" give {kind},{key}=NUMBER"
        )
    return int(text)
