"""Paths and names in a warehouse."""

import os
import re
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from features.documents import read_json, read_toml
from features.errors import DamagedError, UserError, unknown
from features.splits import TimeSplit

MARKER = ".mmrec-warehouse"
RESERVED = ("runs", "raw")  # folders that are no datasets
_LAST_EXTRACTED = ".last-extracted"
"""File of the name of the dataset that the last extraction named."""
_DEMO = "demo"
_LONGEST_NAME = 100
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{_LONGEST_NAME - 1}}}")


def slug(name: str) -> str:
    """Return the folder's name of a backbone: ``hf:org/Name`` becomes ``hf-org-name``."""
    return re.sub(r"[^a-z0-9._]+", "-", name.lower()).strip("-.")


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetInfo:
    """Content of ``dataset.json``, which is written last: a dataset with it is prepared."""

    name: str
    format: str
    """The importer that read the raw files."""
    raw: str
    """The raw root, to which the paths of items are relative: a path, or a URL of a folder in
    object storage."""
    k_core: int
    """Least number of interactions of each user and item; 0 if not filtered."""
    users: int
    items: int
    interactions: int
    fingerprint: str
    """Hash of the ordered item ids; feature tables keep it, because ``item`` depends on it."""
    inputs: dict[str, str]
    """Hash of all items' inputs (texts, or references to files) for each modality."""
    timestamps: bool
    """Every interaction has a time; otherwise the order is that of the raw file."""
    tied: float
    """Share of interactions with the same time as the user's interaction before."""
    ties: str = "file"
    """Order of interactions of equal times: a name in ``mmrec prepare --ties``."""
    tied_ascending: float | None = None
    """Share of the tied neighbours in the raw file whose second item has the larger id; None: no
    such pair, or not counted."""

    sequences: str = ""
    """Hash of the sequences of all users, see :func:`features.dataset.hash_sequences`; empty in
    datasets of earlier versions."""
    checksums: dict[str, dict[str, str | None]] = field(default_factory=dict)
    """Table (``items``, ``interactions``) -> name of each of its files -> checksum of the file;
    empty in datasets of earlier versions."""
    sampled_users: int | None = None
    """Number of users of the random sample of ``mmrec prepare --users``; None: all users."""
    seed: int | None = None
    """Seed of the samples of users and of hidden items; None without one."""
    hidden_items: int = 0
    """Number of items that ``mmrec prepare --hide-items`` keeps out of training: the last ones of
    the catalogue. They are test targets only."""
    min_user: int = 0
    """Least number of interactions of users alone; 0 if not given."""
    time_unit: str | None = None
    """Unit of the timestamps since 1970: ``days``, ``seconds``, ``milliseconds``, ``microseconds``
    or ``nanoseconds``; None if it is unknown."""
    valid_from: int | None = None
    """First time of validation of a split by time, in the unit of the timestamps; None is
    leave-one-out."""
    test_from: int | None = None
    """First time of test of a split by time; None is leave-one-out."""
    duplicate_interactions: str = "keep"
    """Treatment of interactions that agree in user, item and time: ``keep`` or ``drop``."""
    copied_targets: int = 0
    """Held-out targets that agree in user, item and time with a row of their own input."""
    text_columns: list[str] | None = None
    """Columns that form the text of items, in this order; None if the importer has none to choose
    from."""
    item_columns: dict[str, str] | None = None
    """Own columns of items to their SQL types; None in datasets of earlier versions."""

    @property
    def dates(self) -> TimeSplit | None:
        """The dates of a split by time; None is leave-one-out."""
        if self.valid_from is None or self.test_from is None:
            return None
        return TimeSplit(valid_from=self.valid_from, test_from=self.test_from)

    def inputs_of(self, modality: str) -> str:
        """Return the hash of the inputs of a feature table; ``joint`` has two."""
        sources = ("image", "text") if modality == "joint" else (modality,)
        return "+".join(self.inputs.get(source, "") for source in sources)

    def summary(self) -> dict[str, Any]:
        """Return the figures that ``mmrec prepare`` prints."""
        cells = self.users * self.items
        return {
            "dataset": self.name,
            "users": self.users,
            "items": self.items,
            "interactions": self.interactions,
            "average_length": self.interactions / self.users if self.users else 0.0,
            # Repeated pairs count each time, so there can be more interactions than cells.
            "sparsity": max(0.0, 1 - self.interactions / cells) if cells else 1.0,
            "k_core": self.k_core,
            "sampled_users": self.sampled_users,
            "seed": self.seed,
            "min_user": self.min_user,
            "hidden_items": self.hidden_items,
            "valid_from": self.valid_from,
            "test_from": self.test_from,
            "tied": self.tied,
            "ties": self.ties,
            "tied_ascending": self.tied_ascending,
            "duplicate_interactions": self.duplicate_interactions,
            "copied_targets": self.copied_targets,
            "text_columns": self.text_columns,
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
                f"{self.root} is not a warehouse and not empty; give another folder by --warehouse"
            )

    def _is_ours(self) -> bool:
        if (self.root / MARKER).exists():
            return True
        known = {"README.md", *RESERVED}
        return all(
            entry.name in known or entry.name.startswith(".") for entry in self.root.iterdir()
        )

    def create(self) -> None:
        """Create the root and its marker file, if they do not exist."""
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / MARKER).touch()

    # -- datasets ---------------------------------------------------------------------------

    @staticmethod
    def check_name(name: str) -> str:
        """Return ``name`` if it can be the folder of a dataset.

        Raises:
            UserError: The name has other characters, is too long, or is reserved.
        """
        if not _NAME.fullmatch(name) or name in RESERVED:
            raise UserError(
                f"dataset name {name!r} cannot be a folder here; use letters, digits, '.', '_',"
                f" '-', at most {_LONGEST_NAME} of them (not {', '.join(RESERVED)})"
            )
        return name

    def dataset_dir(self, name: str) -> Path:
        """Return the folder of a dataset, which may not exist."""
        return self.root / self.check_name(name)

    def raw_dir(self, name: str) -> Path:
        """Return the default folder of a known dataset's raw files."""
        return self.root / "raw" / name

    def copies_dir(self, bucket: str, prefix: str) -> Path:
        """Return the folder of the copies of raw files that are in object storage."""
        return self.root / "raw" / ".s3" / bucket / prefix

    def datasets(self) -> list[str]:
        """Return the names of the prepared datasets, in alphabetical order."""
        return sorted(path.parent.name for path in self.root.glob("*/dataset.json"))

    def info(self, name: str) -> DatasetInfo:
        """Read ``dataset.json``.

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
        """Return whether a dataset is prepared."""
        return (self.dataset_dir(name) / "dataset.json").exists()

    def choose_dataset(self, name: str | None, option: str = "--dataset") -> tuple[str, str]:
        """Choose a command's dataset: the given one, else the last one named in an extraction.

        Without an extraction, it is the only one; the demo does not count beside another dataset.

        Args:
            name: The given dataset.
            option: Place where the user can name a dataset, for the error.

        Returns:
            The name, and the reason for the choice.

        Raises:
            UserError: No dataset can be chosen.
        """
        if name is not None:
            self.info(name)
            return name, "given"
        prepared = self.datasets()
        if not prepared:
            raise UserError(
                f"no dataset is prepared in {self.root}; run: mmrec prepare --dataset demo"
            )
        last = self._last_extracted()
        if last in prepared:
            return last, "the last one of mmrec extract"
        if last:
            raise UserError(
                f"dataset {last!r}, the last one of mmrec extract, is not prepared; run: mmrec"
                f" extract --dataset {last}, or choose by {option}: {', '.join(prepared)}"
            )
        names = [name for name in prepared if name != _DEMO] or prepared
        if len(names) == 1:
            return names[0], "the only one" if len(prepared) == 1 else "the only one but the demo"
        raise UserError(f"several datasets are prepared: {', '.join(names)}; choose by {option}")

    def remember_extracted(self, name: str) -> None:
        """Record the dataset that an extraction names, also of one that fails later."""
        (self.root / _LAST_EXTRACTED).write_text(f"{name}\n")

    def _last_extracted(self) -> str:
        path = self.root / _LAST_EXTRACTED
        return path.read_text(errors="replace").strip() if path.is_file() else ""

    # -- runs -------------------------------------------------------------------------------

    @property
    def runs_dir(self) -> Path:
        """The folder that holds all runs."""
        return self.root / "runs"

    def runs(self) -> list[str]:
        """Return the names of the runs, oldest first."""
        folders = [path.parent for path in self.runs_dir.glob("*/config.toml")]
        return [path.name for path in sorted(folders, key=lambda p: (_created(p), p.name))]

    def no_runs(self) -> list[Path]:
        """Return the folders in the folder of runs that are no runs."""
        if not self.runs_dir.is_dir():
            return []
        known = {*self.runs(), ""}
        others = (path for path in self.runs_dir.iterdir() if path.name not in known)
        return sorted(path for path in others if path.is_dir() and not path.name.startswith("."))

    def require(self) -> None:
        """Check that the root exists: a misspelt root must not look like an empty warehouse.

        Raises:
            UserError: The folder does not exist.
        """
        if not self.root.is_dir():
            raise UserError(
                f"there is no warehouse in {self.root}; give another by --warehouse, or run:"
                " mmrec prepare --dataset demo"
            )

    def choose_run(self, name: str | None) -> tuple[Path, str]:
        """Choose a command's run: the given one, else the last one.

        Raises:
            UserError: There is no such run, or none at all.
        """
        names = self.runs()
        if name is None:
            if not names:
                raise UserError(
                    f"there is no run in {self.runs_dir}; run: mmrec train --model sasrec"
                )
            if not _created(self.runs_dir / names[0]):  # it may be the last one
                read_toml(
                    self.runs_dir / names[0] / "config.toml",
                    "name a run by --run, or remove this run's folder",
                )
            return self.runs_dir / names[-1], "the last one"
        if name not in names:
            for folder in self.no_runs():
                if folder.name == name:
                    raise UserError(
                        f"{folder} is not a run: it has no config.toml that can be read, so it is"
                        " just beginning, or was killed when it began; train again with --name"
                        f" {name}"
                    )
            raise unknown("run", name, names)
        return self.runs_dir / name, "given"


def _created(run: Path) -> str:
    """Return a run's creation time from its config, because copies change the times of files."""
    try:
        return str(read_toml(run / "config.toml", "")["run"]["created"])
    except (UserError, KeyError, TypeError):
        return ""  # sorts first


def _info(document: Any, path: Path) -> DatasetInfo:
    known = {entry.name: _plain_types(entry.type) for entry in fields(DatasetInfo)}
    # Preparations of earlier versions have no entries of the fields that were added since.
    absent = {
        entry.name
        for entry in fields(DatasetInfo)
        if (entry.default, entry.default_factory) != (MISSING, MISSING)
    }
    if isinstance(document, dict):
        absent -= document.keys()
    wrong = [
        name
        for name, kind in known.items()
        if name not in absent
        and not (isinstance(document, dict) and type(document.get(name)) in kind)
    ]
    if wrong or not document.keys() <= known.keys():
        what = f"without a usable {wrong[0]}" if wrong else "with entries of another version"
        raise DamagedError(f"{path} is damaged ({what}); {_again(path)}")
    return DatasetInfo(**document)


def _plain_types(kind: Any) -> tuple[type, ...]:
    """Return the types of Python that a value of an annotated type can have."""
    union = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return tuple(get_origin(part) or part for part in union)


def _again(path: Path) -> str:
    return (
        f"run: mmrec prepare --dataset {path.parent.name} --format FORMAT --raw DIR"
        " (FORMAT only for one of your own)"
    )
