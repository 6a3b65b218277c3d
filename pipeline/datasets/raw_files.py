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
    files: Files = {
        role: (_resolve(role, root, given[role]),) if role in given else _match(root, patterns)
        for role, patterns in format.files.items()
    }
    for role, paths in files.items():
        if not paths and role in format.importer.required:
            raise UserError(
                f"{root} holds no {role} of {dataset}: expected"
                f" {' or '.join(format.files[role])}; give the folder by --raw or the file by"
                f" --file {role}=PATH"
            )
        if len(paths) > 1 and role not in FOLDER_ROLES:
            names = ", ".join(path.name for path in paths)
            raise UserError(
                f"{root} holds several {role}: {names}; choose one by --file {role}=PATH"
            )
    return dict(files)


def _resolve(role: str, root: Path, given: str) -> Path:
    _refuse_url(given, f"--file {role}={given}")
    path = root / given
    for candidate in (path, Path(given)):
        if candidate.exists():
            return candidate
    raise UserError(
        f"--file {role}={given}: {path} does not exist; give a path relative to {root} or absolute"
    )


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
