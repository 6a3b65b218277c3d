"""The table of known datasets, and of the layouts in which one's own can be.

A new dataset is one entry here. File names are patterns relative to the raw folder, the first that
matches wins; an option of the command line replaces them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from features.errors import UserError, unknown

FOLDERS = ("images", "videos")
"""Roles for which every match of the first pattern counts, and none is needed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One way in which raw files are written down; ``pipeline.importers`` has its reader."""

    about: str
    files: Mapping[str, tuple[str, ...]]
    """Role to patterns, in order of preference."""
    needed: tuple[str, ...] = ("interactions", "items")


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownDataset:
    """One dataset that can be prepared by its name."""

    importer: str
    """A name in ``LAYOUTS``."""
    source: str
    """Where its raw files come from."""
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What differs from the layout's files."""
    k_core: int = 5


_PICTURES = (
    "images", "covers", "posters*", "images.tar", "covers.tar", "images.lmdb", "covers.lmdb",
)  # fmt: skip
_CLIPS = ("videos", "clips")

LAYOUTS: dict[str, Layout] = {
    "movielens": Layout(
        about="ratings and movies as GroupLens releases them",
        files={
            "interactions": ("u.data", "ratings.dat", "ratings.csv", "*sequences*.txt"),
            "items": ("u.item", "movies.dat", "movies.csv"),
            "images": ("posters*", "images"),
            "videos": ("trailers", "videos"),
            "plots": ("movies_extrainfos.dat",),
        },
    ),
    "sequences": Layout(
        about="a line 'user item item ...' for each user, oldest first (SASRec, S3-Rec, MicroLens)",
        files={
            "interactions": ("sequences.txt", "sequences.tsv", "*_pairs.tsv"),
            "items": ("items.jsonl", "items.csv", "items.tsv", "items.parquet"),
            "images": _PICTURES,
            "videos": _CLIPS,
        },
        needed=("interactions",),
    ),
    "bili": Layout(
        about="users, items and covers as PMMRec, MMSR and NineRec release them",
        files={
            "interactions": ("*users*.tsv", "*behaviour*.tsv", "*behavior*.tsv"),
            "items": ("*items*.tsv", "*items*.csv", "*item*.tsv", "*item*.csv"),
            "images": ("*.lmdb", "*cover*", "images"),
            "videos": _CLIPS,
        },
    ),
    "table": Layout(
        about="interactions (user_id, item_id, timestamp) and items (item_id, title, ...)",
        files={
            "interactions": ("interactions.parquet", "interactions.csv", "interactions.tsv"),
            "items": ("items.parquet", "items.csv", "items.tsv", "items.jsonl"),
            "images": _PICTURES,
            "videos": _CLIPS,
        },
    ),
}

DATASETS: dict[str, KnownDataset] = {
    "ml-100k": KnownDataset(
        importer="movielens",
        source="GroupLens, grouplens.org/datasets/movielens/100k",
        files={"interactions": ("u.data",), "items": ("u.item",)},
    ),
    "ml-1m": KnownDataset(
        importer="movielens",
        source="GroupLens, grouplens.org/datasets/movielens/1m; beside it posters*/MOVIE_ID.jpg",
        files={
            "interactions": ("ratings.dat", "ml1m_sequences_chronological.txt"),
            "items": ("movies.dat",),
        },
    ),
    "ml-latest-small": KnownDataset(
        importer="movielens",
        source="GroupLens, grouplens.org/datasets/movielens/latest",
        files={"interactions": ("ratings.csv",), "items": ("movies.csv",)},
    ),
    "amazon-beauty": KnownDataset(
        importer="sequences",
        source="Amazon reviews 2014 (jmcauley.ucsd.edu/data/amazon), 5-core sequences of S3-Rec",
        files={
            "interactions": ("Beauty.txt",),
            "items": ("Beauty_items.jsonl",),
            "images": ("Beauty_images", "images"),
        },
    ),
    "amazon-sports": KnownDataset(
        importer="sequences",
        source="Amazon reviews 2014 (jmcauley.ucsd.edu/data/amazon), 5-core sequences of S3-Rec",
        files={
            "interactions": ("Sports_and_Outdoors.txt",),
            "items": ("Sports_and_Outdoors_items.jsonl",),
            "images": ("Sports_and_Outdoors_images", "images"),
        },
    ),
    # The releases below are filtered already; 1 only leaves out items that nobody has.
    "microlens-50k": KnownDataset(
        importer="sequences",
        source="MicroLens, github.com/westlake-repl/MicroLens",
        files={
            "interactions": ("MicroLens-50k_pairs.tsv",),
            "items": ("MicroLens-50k_titles.csv",),
            "images": ("MicroLens-50k_covers", "covers"),
            "videos": ("MicroLens-50k_videos", "videos"),
        },
        k_core=1,
    ),
    "bili": KnownDataset(
        importer="bili",
        source="PMMRec (github.com/ICDE24/PMMRec) or NineRec (github.com/westlake-repl/NineRec)",
        k_core=1,
    ),
    "kwai": KnownDataset(
        importer="bili",
        source="PMMRec (github.com/ICDE24/PMMRec) or NineRec (github.com/westlake-repl/NineRec)",
        k_core=1,
    ),
    "hm": KnownDataset(
        importer="bili",
        source="PMMRec (github.com/ICDE24/PMMRec) or MoRec (github.com/westlake-repl/IDvs.MoRec)",
        k_core=1,
    ),
    "demo": KnownDataset(
        importer="table",
        source="made by this program",
        files={"interactions": ("interactions.csv",), "items": ("items.csv",)},
        k_core=0,
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How a dataset will be read."""

    importer: str
    files: Mapping[str, tuple[str, ...]]
    """Role to patterns."""
    needed: tuple[str, ...]
    k_core: int


def plan(name: str, layout: str | None) -> Plan:
    """Say how ``name`` is read: as the table knows it, or in the layout given.

    Raises:
        UserError: Neither the dataset nor the layout is known.
    """
    if layout is not None:
        if layout not in LAYOUTS:
            raise unknown("format", layout, list(LAYOUTS))
        form = LAYOUTS[layout]
        return Plan(importer=layout, files=form.files, needed=form.needed, k_core=0)
    if name not in DATASETS:
        raise UserError(
            f"unknown dataset {name!r}; known: {', '.join(DATASETS)};"
            f" one of your own is prepared by: mmrec prepare --dataset {name} --format FORMAT"
            f" --raw DIR (formats: {', '.join(LAYOUTS)})"
        )
    known = DATASETS[name]
    form = LAYOUTS[known.importer]
    return Plan(
        importer=known.importer,
        files={**form.files, **known.files},
        needed=form.needed,
        k_core=known.k_core,
    )


def locate(
    name: str, how: Plan, root: Path, given: Mapping[str, str]
) -> dict[str, tuple[Path, ...]]:
    """Find the files of every role; a role that is not needed may stay empty.

    Args:
        name: The dataset, for messages.
        how: Its plan.
        root: The raw folder.
        given: Role to a path, relative to ``root`` or not, that replaces the patterns.

    Raises:
        UserError: The folder or a needed file is not there, or two files fit.
    """
    for role in given:
        if role not in how.files:
            raise unknown("role in --file", role, list(how.files))
    if not root.is_dir():
        raise UserError(
            f"{root} is no folder; the raw files of {name} are expected there"
            f" ({_wanted(how)}); run: mmrec prepare --dataset {name} --raw DIR"
        )
    found = {}
    for role, patterns in how.files.items():
        paths = (_given(role, root, given[role]),) if role in given else _first(root, patterns)
        if not paths and role in how.needed:
            raise UserError(
                f"{root} holds no {role} of {name}: expected {' or '.join(patterns)};"
                f" give the folder by --raw or the file by --file {role}=PATH"
            )
        if len(paths) > 1 and role not in FOLDERS:
            names = ", ".join(path.name for path in paths)
            raise UserError(
                f"{root} holds several {role}: {names}; choose one by --file {role}=PATH"
            )
        found[role] = paths
    return found


def _given(role: str, root: Path, path: str) -> Path:
    below = root / path
    for candidate in (below, Path(path)):
        if candidate.exists():
            return candidate
    raise UserError(
        f"--file {role}={path}: {below} does not exist; give a path relative to {root} or absolute"
    )


def _first(root: Path, patterns: tuple[str, ...]) -> tuple[Path, ...]:
    for pattern in patterns:
        paths = tuple(sorted(root.glob(pattern)))
        if paths:
            return paths
    return ()


def _wanted(how: Plan) -> str:
    return "; ".join(f"{role}: {' or '.join(how.files[role])}" for role in how.needed)
