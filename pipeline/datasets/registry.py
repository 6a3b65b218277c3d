"""The registry of datasets: the datasets that ``mmrec prepare`` knows by name.

A new dataset of a known layout is one entry here. An installed package adds one by an entry point
of the group ``mmrec.datasets`` that refers to a :class:`KnownDataset`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from features.errors import UserError
from features.registry import Registry
from pipeline.datasets.demo import make_demo
from pipeline.datasets.importers.registry import IMPORTERS


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownDataset:
    """A dataset that can be prepared by its name.

    Examples:
        >>> beauty = KnownDataset(
        ...     importer="sequences",
        ...     source="5-core sequences of S3-Rec",
        ...     files={"interactions": ("Beauty.txt",)},
        ... )
        >>> beauty.k_core
        5
    """

    importer: str
    """Name of its layout in :data:`pipeline.datasets.importers.registry.IMPORTERS`."""
    source: str
    """Origin of the raw files, for ``mmrec datasets``."""
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Role to file name patterns, where they differ from those of the importer."""
    k_core: int = 5
    """Minimum interactions of every user and item; 0 keeps all items, also those without any."""
    generate: Callable[[Path], object] | None = None
    """Write the raw files into a new folder, for a dataset that the program makes itself."""


_PMMREC = "PMMRec (github.com/ICDE24/PMMRec)"


def _amazon(category: str) -> KnownDataset:
    """Return the entry of a category of the reviews as released."""
    ratings = (
        f"ratings_{category}.csv*",
        f"reviews_{category}.json*",
        f"reviews_{category}_5.json*",
    )
    return KnownDataset(
        importer="amazon",
        source="Amazon reviews 2014, 2018 or 2023 (amazon-reviews-2023.github.io), 5-core",
        files={
            "interactions": (
                *ratings, f"{category}.csv*", f"{category}.json*", f"{category}_5.json*",
            ),
            "items": (f"meta_{category}.json*",),
            "images": (f"{category}_images", "images"),
        },
    )  # fmt: skip


_OWN = {
    "ml-100k": KnownDataset(
        importer="movielens",
        source="GroupLens, grouplens.org/datasets/movielens/100k",
        files={"interactions": ("u.data",), "items": ("u.item",)},
    ),
    "ml-1m": KnownDataset(
        importer="movielens",
        source="GroupLens, grouplens.org/datasets/movielens/1m; posters in posters*/MOVIE_ID.jpg",
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
    "amazon-beauty-raw": _amazon("Beauty"),
    "amazon-sports-raw": _amazon("Sports_and_Outdoors"),
    "amazon-clothing": _amazon("Clothing_Shoes_and_Jewelry"),
    "amazon-home": _amazon("Home_and_Kitchen"),
    "amazon-toys": _amazon("Toys_and_Games"),
    "amazon-instruments": _amazon("Musical_Instruments"),
    "amazon-scientific": _amazon("Industrial_and_Scientific"),
    # These releases are filtered already; 1 only removes items without an interaction.
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
    "msr-vtt": KnownDataset(
        importer="captions",
        source="MSR-VTT, 1,000 test captions of JSFusion (MSRVTT_JSFUSION_test.csv)",
        files={
            "items": ("MSRVTT_JSFUSION_test.csv",),
            "videos": ("videos", "MSRVTT_Videos", "TestVideo"),
        },
        k_core=0,
    ),
    "webvid": KnownDataset(
        importer="captions",
        source="WebVid (github.com/m-bain/webvid)",
        files={"items": ("results_*.csv", "webvid*.csv")},
        k_core=0,
    ),
    "amazon": KnownDataset(importer="bili", source=_PMMREC, k_core=1),
    **{
        f"{source}-{topic}": KnownDataset(importer="bili", source=_PMMREC, k_core=1)
        for source, topics in (
            ("bili", ("food", "movie", "cartoon")),
            ("kwai", ("food", "movie", "cartoon")),
            ("hm", ("clothes", "shoes")),
            ("amazon", ("clothes", "shoes")),
        )
        for topic in topics
    },
    "demo": KnownDataset(
        importer="table",
        source="made by this program",
        files={"interactions": ("interactions.csv",), "items": ("items.csv",)},
        k_core=0,
        generate=make_demo,
    ),
}

DATASETS: Registry[KnownDataset] = Registry("dataset", _OWN, group="mmrec.datasets")
"""Name of a dataset, as ``--dataset`` takes it, to its entry."""


def find_dataset(name: str) -> KnownDataset:
    """Return the entry of a dataset.

    Raises:
        UserError: The name is unknown, or its package cannot be used.
    """
    try:
        return DATASETS.find(name)
    except UserError as error:
        if name in DATASETS.broken:
            raise
        raise UserError(
            f"{error}; to prepare your own, run: mmrec prepare --dataset {name} --format FORMAT"
            f" --raw DIR (formats: {', '.join(IMPORTERS)})"
        ) from None
