"""References to images and videos in a table of items: resolved, or counted as absent.

A reference that is a URL, leads out of the raw folder or has no file is absent: its item has no
image or video by it, and all other items are prepared.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import duckdb
import pyarrow as pa

from pipeline.datasets.importers.messages import plural, quote_all
from pipeline.media.reader import MediaReader
from pipeline.media.references import is_url, relative_reference, spellings

ROLES = {"image": "images", "video": "videos"}
"""Column of the table of items to the role of its files."""
_EXAMPLES = 3
_LONGEST = 120  # characters of a reference in a message


class ReferenceResolver:
    """Resolve references relative to the raw root, and count those that lead to no file.

    Args:
        root: The raw root.
        column: ``image`` or ``video``, for messages.
    """

    def __init__(self, root: Path, column: str) -> None:
        self._root = root
        self._column = column
        self._media = MediaReader(root)
        self._counts = {"url": 0, "outside": 0, "missing": 0}
        self._examples: dict[str, list[str]] = {kind: [] for kind in self._counts}

    def resolve(self, reference: str, items: int = 1) -> str | None:
        """Return the reference relative to the root in the spelling of its file; None without one.

        Args:
            reference: The reference as the raw table has it.
            items: Number of items with this reference, for the messages.
        """
        path = None if is_url(reference) else self._existing(reference)
        if path is None:
            kind = self._kind(reference)
            self._counts[kind] += items
            if len(self._examples[kind]) < _EXAMPLES:
                self._examples[kind].append(reference[:_LONGEST])
        return path

    def notes(self) -> Iterator[str]:
        """Close the opened containers; yield messages about absent references, one line each."""
        self._media.close()
        remedies = {
            "url": (
                "is a URL",
                "URLs are not read: download the files and name them by item id",
            ),
            "outside": (
                f"leads outside {self._root}",
                f"move the files below that folder, or give their folder by --file"
                f" {ROLES[self._column]}=PATH",
            ),
            "missing": ("has no file", f"write paths relative to {self._root}"),
        }
        for kind, count in self._counts.items():
            if count:
                fault, remedy = remedies[kind]
                yield (
                    f"{plural(count, 'item')} whose {self._column} {fault} (such as"
                    f" {quote_all(self._examples[kind])}), counted as absent; {remedy}"
                )

    def _existing(self, reference: str) -> str | None:
        for spelling in spellings(reference):
            path = relative_reference(self._root, spelling)
            if path is not None and self._media.exists(path):
                return path
        return None

    def _kind(self, reference: str) -> str:
        cleaned = next(islice(spellings(reference), 1, None))
        # Web shops write the URL of an image without its scheme: //cdn.example.org/1.jpg.
        if is_url(reference) or cleaned.startswith("//"):
            return "url"
        return "outside" if relative_reference(self._root, cleaned) is None else "missing"


def create_references(db: duckdb.DuckDBPyConnection, root: Path, column: str) -> list[str]:
    """Create ``<column>_references`` (reference, path) of the references in ``described``.

    ``path`` is the reference relative to the root, spelled as its file; NULL if it is absent.

    Args:
        db: A connection with the table ``described``.
        root: The raw root.
        column: ``image`` or ``video``.

    Returns:
        Messages for the user, one line each.
    """
    resolver = ReferenceResolver(root, column)
    rows = db.sql(
        f"SELECT {column}, count(*) FROM described WHERE trim({column}) <> '' GROUP BY 1"
        " ORDER BY min(item_id), 1"
    ).fetchall()
    table = pa.table(
        {
            "reference": pa.array([reference for reference, _ in rows], pa.string()),
            "path": pa.array([resolver.resolve(*row) for row in rows], pa.string()),
        }
    )
    db.register("_references", table)
    db.execute(f"CREATE TABLE {column}_references AS FROM _references")
    db.unregister("_references")
    return list(resolver.notes())
