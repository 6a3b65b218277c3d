"""Stand-ins for packages that mmrec imports and training does not use.

The models, the losses and the training loop import DuckDB, PyArrow and others, because the code
that reads and writes files is imported with them. A machine with a GPU can lack these packages. A
stand-in can be imported, and the module that imports it can call its attributes until its own
import ends. A later call raises ``ModuleNotFoundError``, which names the package.

The import of this module installs the stand-ins, so ``pytest -p tests.gpu.stand_ins`` has them
before it reads a ``conftest.py``. An installed package is never replaced.
"""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

PACKAGES = ("av", "duckdb", "filelock", "pyarrow", "safetensors", "tomli_w")


class _Placeholder:
    """An attribute of a package that is not installed."""

    def __init__(self, package: str, *_: object, **__: object) -> None:
        self._package = package

    def __getattr__(self, name: str) -> "_Placeholder":
        if name.startswith("__"):
            raise AttributeError(name)
        return _Placeholder(self._package)

    def __call__(self, *_: object, **__: object) -> "_Placeholder":
        spec = sys._getframe(1).f_globals.get("__spec__")
        if not getattr(spec, "_initializing", False):
            raise ModuleNotFoundError(f"{self._package} is not installed", name=self._package)
        return _Placeholder(self._package)

    def __getitem__(self, _: object) -> "_Placeholder":
        return _Placeholder(self._package)

    def __or__(self, other: object) -> Any:  # in annotations
        return other

    def __ror__(self, other: object) -> Any:
        return other


class _StandIn(ModuleType):
    """A package, or a module of it, that is not installed."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[:1].isupper():  # a class, perhaps of an exception that a function catches
            return type(name, (Exception,), {"__init__": _refuse(self.__name__.partition(".")[0])})
        return _Placeholder(self.__name__.partition(".")[0])


def _refuse(package: str) -> Any:
    def refuse(self: object, *_: object, **__: object) -> None:
        raise ModuleNotFoundError(f"{package} is not installed", name=package)

    return refuse


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Find a stand-in where no other finder finds the package."""

    def find_spec(
        self, fullname: str, path: object, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in PACKAGES:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def missing() -> list[str]:
    """Return the packages that have a stand-in."""
    return [name for name in PACKAGES if isinstance(sys.modules.get(name), _StandIn)]


if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
    sys.meta_path.append(_Finder())
