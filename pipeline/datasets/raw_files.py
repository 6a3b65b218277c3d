"""The raw files of a dataset: the files that are expected, and where they are."""

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from features.errors import UserError
from features.registry import Registry
from pipeline.datasets.importers.base import FOLDER_ROLES, Files, Importer
from pipeline.datasets.importers.registry import IMPORTERS
from pipeline.datasets.registry import find_dataset


@dataclass(frozen=True, kw_only=True, slots=True)
class RawFormat:
    """The importer of a dataset, and the patterns of its files."""

    name: str
    """Name of the importer."""
    importer: Importer
    files: Registry[tuple[str, ...]]
    """Role to file name patterns."""
    k_core: int


def raw_format(dataset: str, format: str | None = None) -> RawFormat:
    """Return the format of a dataset: the one given, else the one that the dataset is known by.

    Raises:
        UserError: The dataset or the format is unknown, or the entry of the dataset has a role that
            its importer does not have.
    """
    if format is not None:
        importer = IMPORTERS.find(format)
        files = _roles(importer)
        return RawFormat(name=format, importer=importer, files=files, k_core=0)
    known = find_dataset(dataset)
    importer = IMPORTERS.find(known.importer)
    files = _roles(importer)
    for role, patterns in known.files.items():
        files.find(role)
        files[role] = patterns
    return RawFormat(name=known.importer, importer=importer, files=files, k_core=known.k_core)


def _roles(importer: Importer) -> Registry[tuple[str, ...]]:
    return Registry("file role", importer.files)


def locate_files(
    dataset: str, format: RawFormat, root: Path, given: Mapping[str, str]
) -> dict[str, tuple[Path, ...]]:
    """Return the paths of every role; a role that is not required may have none.

    Args:
        dataset: Name of the dataset, for messages.
        format: Its format.
        root: The raw folder.
        given: Role to a path that replaces the patterns. The path is relative to ``root``, relative
            to the working directory, or absolute.

    Raises:
        UserError: The folder or a required file is missing, a role is unknown, or two files match.
    """
    for role in given:
        format.files.find(role)
    _refuse_url(str(root), f"--raw {root}")
    if not root.is_dir():
        raise UserError(
            f"{root} is not a folder; the raw files of {dataset} are expected there"
            f" ({_expected(format)}); run: mmrec prepare --dataset {dataset} --raw DIR"
        )
    absent = [role for role, name in given.items() if _find_given(root, name, role) is None]
    if absent:
        options = " and ".join(f"--file {role}={given[role]}" for role in absent)
        verb = "does not exist" if len(absent) == 1 else "do not exist"
        raise UserError(f"{options}: {verb}; give a path relative to {root} or absolute")
    files: Files = {
        role: (path,) if (path := _find_given(root, given.get(role), role)) else _match(root, names)
        for role, names in format.files.items()
    }
    _check_roles(dataset, format, root, files)
    return dict(files)


def _check_roles(dataset: str, format: RawFormat, root: Path, files: Files) -> None:
    """Refuse a required role without a file, and a role of one file with several."""
    absent = [role for role in format.importer.required if not files[role]]
    if absent:
        expected = " and ".join(
            f"no {role} of {dataset}, expected {' or '.join(format.files[role])}" for role in absent
        )
        options = " ".join(f"--file {role}=PATH" for role in absent)
        raise UserError(
            f"{root} holds {expected}; give the folder by --raw or the file by {options}"
        )
    several = {
        role: paths for role, paths in files.items() if len(paths) > 1 and role not in FOLDER_ROLES
    }
    if several:
        choices = " and ".join(
            f"several {role}: {', '.join(path.name for path in paths)}"
            for role, paths in several.items()
        )
        options = " ".join(f"--file {role}=PATH" for role in several)
        raise UserError(f"{root} holds {choices}; choose one by {options}")


def _find_given(root: Path, given: str | None, role: str) -> Path | None:
    """Return the path that ``--file`` names for a role; None if it does not exist or is not given.

    Raises:
        UserError: The path is a URL.
    """
    if given is None:
        return None
    _refuse_url(given, f"--file {role}={given}")
    return next((path for path in (root / given, Path(given)) if path.exists()), None)


def _refuse_url(given: str, option: str) -> None:
    # Path writes the two slashes of a URL as one.
    option = re.sub(r"(?<=:)/(?!/)", "//", option, count=1)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", given) and not Path(given).exists():
        raise UserError(f"{option} is a URL; download the files and give the path on this machine")


def _match(root: Path, patterns: tuple[str, ...]) -> tuple[Path, ...]:
    """Return the matches of the first pattern that has any; the case as written is preferred."""
    for pattern in patterns:
        paths = tuple(sorted(root.glob(pattern)))
        if paths:
            return paths
    for pattern in patterns:
        matches = re.compile(fnmatch.translate(pattern.lower())).match
        paths = tuple(sorted(path for path in root.iterdir() if matches(path.name.lower())))
        if paths:
            return paths
    return ()


def _expected(format: RawFormat) -> str:
    return "; ".join(
        f"{role}: {' or '.join(format.files[role])}" for role in format.importer.required
    )
