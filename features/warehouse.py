"""Where things stand: the warehouse's paths, and the names of what it holds."""

import json
import os
import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from features.errors import UserError, unknown

MARKER = ".mmrec-warehouse"
RESERVED = ("runs", "raw")  # folders beside the datasets
_LONGEST_NAME = 100
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{_LONGEST_NAME - 1}}}")


def slug(name: str) -> str:
    """Turn a backbone's name into a folder's name: ``hf:org/Name`` becomes ``hf-org-name``."""
    return re.sub(r"[^a-z0-9._]+", "-", name.lower()).strip("-.")


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetInfo:
    """What ``dataset.json`` says; written last, so its presence means: prepared whole."""

    name: str
    format: str
    """The importer that read the raw files."""
    raw: str
    """The raw root, to which the paths of items are relative."""
    k_core: int
    """Every user and every item has at least this many interactions; 0: not filtered."""
    users: int
    items: int
    interactions: int
    fingerprint: str
    """Hash of the ordered item ids: feature tables remember it, since ``item`` depends on it."""
    inputs: dict[str, str]
    """Modality to a hash of what every item has of it (the text, or the reference of a file)."""
    timestamps: bool
    """Whether every interaction bears a time (else the order of the raw file is the order)."""
    tied: float
    """Share of interactions whose time equals that of the one before, same user."""

    def inputs_of(self, modality: str) -> str:
        """The hash of what a feature table of ``modality`` is made of; joint: two of them."""
        sources = ("image", "text") if modality == "joint" else (modality,)
        return "+".join(self.inputs.get(source, "") for source in sources)

    def summary(self) -> dict[str, Any]:
        """Give the figures that ``mmrec prepare`` prints."""
        cells = self.users * self.items
        return {
            "dataset": self.name,
            "users": self.users,
            "items": self.items,
            "interactions": self.interactions,
            "average_length": self.interactions / self.users if self.users else 0.0,
            # A pair that comes again counts again; none of the table can be less than empty.
            "sparsity": max(0.0, 1 - self.interactions / cells) if cells else 1.0,
            "k_core": self.k_core,
        }


class Warehouse:
    """All data under one root: ``--warehouse``, else ``$MMREC_WAREHOUSE``, else ``./warehouse``.

    Raises:
        UserError: ``root`` is a file or a folder that holds something else.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = Path(root or os.environ.get("MMREC_WAREHOUSE") or "warehouse")
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"{self.root} is a file, not a warehouse; give a folder by --warehouse")
        if self.root.is_dir() and not self._is_ours():
            raise UserError(
                f"{self.root} is no warehouse and not empty; give another folder by --warehouse"
            )

    def _is_ours(self) -> bool:
        if (self.root / MARKER).exists():
            return True
        known = {"README.md", *RESERVED}
        return all(
            entry.name in known or entry.name.startswith(".") for entry in self.root.iterdir()
        )

    def create(self) -> None:
        """Make the root and mark it as ours, if that has not been done."""
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / MARKER).touch()

    # -- datasets ---------------------------------------------------------------------------

    @staticmethod
    def check_name(name: str) -> str:
        """Return ``name`` if it can be the folder of a dataset.

        Raises:
            UserError: It cannot.
        """
        if not _NAME.fullmatch(name) or name in RESERVED:
            raise UserError(
                f"dataset name {name!r} cannot be a folder here; use letters, digits, '.', '_',"
                f" '-', at most {_LONGEST_NAME} of them (not {', '.join(RESERVED)})"
            )
        return name

    def dataset_dir(self, name: str) -> Path:
        """The folder of one dataset, there or not."""
        return self.root / self.check_name(name)

    def raw_dir(self, name: str) -> Path:
        """Where the raw files of a known dataset are expected when none are named."""
        return self.root / "raw" / name

    def datasets(self) -> list[str]:
        """Names of the datasets that are prepared whole, in alphabetical order."""
        return sorted(path.parent.name for path in self.root.glob("*/dataset.json"))

    def info(self, name: str) -> DatasetInfo:
        """Read what ``dataset.json`` says.

        Raises:
            UserError: The dataset is not prepared, or its description cannot be read.
        """
        path = self.dataset_dir(name) / "dataset.json"
        if not path.exists():
            known = ", ".join(self.datasets()) or "none"
            raise UserError(
                f"dataset {name!r} is not prepared in {self.root} (prepared: {known});"
                f" run: mmrec prepare --dataset {name}"
            )
        return _info(read_json(path, _again(path)), path)

    def is_prepared(self, name: str) -> bool:
        """Whether the canonical tables are there, whole."""
        return (self.dataset_dir(name) / "dataset.json").exists()

    def choose_dataset(self, name: str | None) -> tuple[str, str]:
        """Pick the dataset of a command: the one given, the only one, the last one extracted.

        Returns:
            The name and why it was picked.

        Raises:
            UserError: None can be picked.
        """
        if name is not None:
            self.info(name)
            return name, "given"
        names = self.datasets()
        if not names:
            raise UserError(
                f"no dataset is prepared in {self.root}; run: mmrec prepare --dataset demo"
            )
        if len(names) == 1:
            return names[0], "the only one"
        stamps = {
            name: max(
                (
                    path.stat().st_mtime_ns
                    for path in (self.root / name).glob("features/**/manifest.json")
                ),
                default=0,
            )
            for name in names
        }
        last = max(names, key=lambda name: (stamps[name], name))
        if not stamps[last]:
            raise UserError(
                f"several datasets are prepared: {', '.join(names)}; choose by --dataset"
            )
        return last, "the last one extracted"

    # -- runs -------------------------------------------------------------------------------

    @property
    def runs_dir(self) -> Path:
        """The folder that holds all runs."""
        return self.root / "runs"

    def runs(self) -> list[str]:
        """Names of the runs, the oldest first."""
        found = [path.parent for path in self.runs_dir.glob("*/config.toml")]
        return [path.name for path in sorted(found, key=lambda p: (_created(p), p.name))]

    def no_runs(self) -> list[Path]:
        """Folders among the runs that are none, or cannot be read."""
        if not self.runs_dir.is_dir():
            return []
        known = {*self.runs(), ""}
        found = (path for path in self.runs_dir.iterdir() if path.name not in known)
        return sorted(path for path in found if path.is_dir() and not path.name.startswith("."))

    def require(self) -> None:
        """Refuse to answer questions about a root that is not there: a misspelt one is not empty.

        Raises:
            UserError: There is no such folder.
        """
        if not self.root.is_dir():
            raise UserError(
                f"there is no warehouse in {self.root}; give another by --warehouse, or run:"
                " mmrec prepare --dataset demo"
            )

    def choose_run(self, name: str | None) -> tuple[Path, str]:
        """Pick the run of a command: the one given, else the last one.

        Raises:
            UserError: There is no such run, or none at all.
        """
        names = self.runs()
        if name is None:
            if not names:
                raise UserError(
                    f"there is no run in {self.runs_dir}; run: mmrec train --model sasrec"
                )
            return self.runs_dir / names[-1], "the last one"
        if name not in names:
            for folder in self.no_runs():
                if folder.name == name:
                    raise UserError(
                        f"{folder} is no run: it has no config.toml that can be read, so it is just"
                        " beginning, or was killed when it began; remove it and train again"
                    )
            raise unknown("run", name, names)
        return self.runs_dir / name, "given"


def _created(run: Path) -> str:
    """When a run began, as it says itself: times of files do not survive being copied."""
    try:
        with (run / "config.toml").open("rb") as stream:
            return str(tomllib.load(stream)["run"]["created"])
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return ""  # a damaged one is never the last one; named, it says what is wrong


def read_json(path: Path, remedy: str) -> Any:
    """Read one JSON document.

    Raises:
        UserError: The file is not JSON; ``remedy`` says what to do.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from None


def _info(document: Any, path: Path) -> DatasetInfo:
    known: dict[str, Any] = {entry.name: entry.type for entry in fields(DatasetInfo)}
    known["inputs"] = dict
    wrong = [
        name
        for name, kind in known.items()
        if not isinstance(document, dict) or type(document.get(name)) is not kind
    ]
    if wrong or document.keys() != known.keys():
        what = f"without a usable {wrong[0]}" if wrong else "with entries of another version"
        raise UserError(f"{path} is damaged ({what}); {_again(path)}")
    return DatasetInfo(**document)


def _again(path: Path) -> str:
    return (
        f"run: mmrec prepare --dataset {path.parent.name} --format FORMAT --raw DIR"
        " (FORMAT only for one of your own)"
    )
