"""The registry of importers: one entry for each raw layout.

A new layout is one file in this folder and one line here. An installed package adds one by an
entry point of the group ``mmrec.importers`` that refers to an
:class:`~pipeline.datasets.importers.base.Importer`.
"""

from features.registry import Registry
from pipeline.datasets.importers import amazon, bili, captions, movielens, recbole, sequences, table
from pipeline.datasets.importers.base import Importer

IMPORTERS: Registry[Importer] = Registry(
    "format",
    {
        "movielens": movielens.IMPORTER,
        "sequences": sequences.IMPORTER,
        "bili": bili.IMPORTER,
        "amazon": amazon.IMPORTER,
        "recbole": recbole.IMPORTER,
        "captions": captions.IMPORTER,
        "caption-items": captions.EACH_CAPTION,
        "table": table.IMPORTER,
    },
    group="mmrec.importers",
)
"""Name of a layout, as ``--format`` takes it, to its importer."""
