"""An exported run, read back: lists for a history without a warehouse.

Legend: N rows of the table of items, S listed items, L items of a history, K items of a list.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from features.atomic_files import read_errors, read_table
from features.dataset import Ints
from features.documents import read_json
from features.errors import DamagedError, UserError
from retrieval.approximate_indexes import ApproximateIndex
from retrieval.default_index import DefaultIndex
from retrieval.indexes import TopItems
from retrieval.listed_items import ListedItems
from retrieval.registry import make_index
from retrieval.seen_items import SeenItems
from trainer.evaluation.search_facts import SearchFacts, describe_approximate, unusable_index
from trainer.runs.choice import Choice
from trainer.runs.export import FORMAT, ITEMS, MANIFEST, SEQUENCE_ENCODER, require_packages
from trainer.runs.recommend import Suggestion, index_of, name_examples

_RECALL_ITEMS = 100  # items whose lists of an approximate index are compared with exact ones
_REMEDY = "export the run again: mmrec export RUN --out DIR"


class ExportedRun:
    """The files of ``mmrec export``.

    Args:
        folder: The folder.
        index: Kind and parameters, see :func:`retrieval.registry.make_index`.
        choice: The items that can be recommended; by default all that are listed.

    Raises:
        UserError: A package is not installed, the folder has no export, a file is damaged, or no
            item is left.
    """

    def __init__(self, folder: Path, *, index: str, choice: Choice | None = None) -> None:
        require_packages()
        if not (folder / MANIFEST).exists():
            raise UserError(f"{folder} has no complete export ({MANIFEST}); {_REMEDY}")
        self.manifest: dict[str, Any] = read_json(folder / MANIFEST, _REMEDY)
        if self.manifest.get("format") != FORMAT:
            raise UserError(f"{folder} is an export of another version of mmrec; {_REMEDY}")
        column = self.manifest["history"]["column"]
        names = ["item_id", "vector", "text", "cold", "listed"]
        with read_errors(folder / ITEMS, _REMEDY):
            table = read_table(folder / ITEMS, list(dict.fromkeys([*names, column])))
        self.item_ids: pa.Array = table.column("item_id").combine_chunks()
        self._texts, self._cold = table.column("text"), table.column("cold").to_numpy()
        self._inputs_NW = _matrix(table, column)
        is_listed_N = table.column("listed").to_numpy() & (choice or Choice()).allowed(
            self.item_ids
        )
        if not is_listed_N.any():
            raise UserError("no item is left to recommend; allow more items")
        self._listed = ListedItems.of(is_listed_N)
        self.index = index
        self._listed_SD = _matrix(table, "vector")[self._listed.rows_S]
        with unusable_index():
            self._index = make_index(index, self._listed_SD)
        self._session = _open_session(folder / SEQUENCE_ENCODER)

    @property
    def source(self) -> dict[str, Any]:
        """Names of the run and of its dataset, and ``none``: controls are not exported."""
        return {key: self.manifest[key] for key in ("run", "dataset")} | {"control": "none"}

    def item(self, item_id: str) -> int:
        """Return the row of an item.

        Raises:
            UserError: The export has no item with the id.
        """
        row = index_of(self.item_ids, item_id)
        if row < 0:
            raise UserError(
                f"the export has no item {item_id!r} ({name_examples(self.item_ids, 'items')});"
                " give an id of items.parquet"
            )
        return row

    def for_history(
        self, items: Sequence[int] | Ints, k: int, *, keep_seen: bool = False
    ) -> TopItems:
        """Recommend for one history.

        Args:
            items: (L,) rows of the items, oldest first, at least one.
            k: Length of the list.
            keep_seen: Let items of the history be recommended again.

        Returns:
            (1, K) scores and (1, K) rows, see :meth:`retrieval.indexes.Index.search`.
        """
        history = np.asarray(items, dtype=np.int64)
        last = history[-self.manifest["history"]["length"] :]
        feed = {"inputs": self._inputs_NW[last][None], "lengths": np.array([len(last)])}
        (query_1D,) = self._session.run(None, feed)
        seen = SeenItems(items=history, offsets=np.array([0, len(history)]))
        exclude = None if keep_seen else self._listed.seen(seen)
        top = self._index.search(query_1D, min(k, len(self._listed)), exclude)
        return top[0], self._listed.restored(top[1])

    def search_facts(self, k: int) -> SearchFacts:
        """Return how the index searched; an approximate one is measured with items as queries."""
        if isinstance(self._index, ApproximateIndex):
            queries = torch.from_numpy(self._listed_SD[:_RECALL_ITEMS])
            return describe_approximate(self._index, queries, k)
        return SearchFacts(line=self._index.choice if isinstance(self._index, DefaultIndex) else "")

    def named(self, top: TopItems) -> list[Suggestion]:
        """Return the first list with ids and texts, for people."""
        scores, rows = top[0][0], top[1][0]
        return [
            Suggestion(
                rank=rank,
                item_id=self.item_ids[row].as_py(),
                text=self._texts[row].as_py(),
                score=float(score),
                cold=bool(self._cold[row]),
            )
            for rank, (row, score) in enumerate(zip(rows[rows >= 0], scores, strict=False), 1)
        ]


def _matrix(table: pa.Table, column: str) -> Any:
    """Return a column of vectors as (N, W) float32."""
    return table.column(column).combine_chunks().flatten().to_numpy().reshape(len(table), -1)


def _open_session(path: Path) -> Any:
    """Open an ONNX file with onnxruntime.

    Raises:
        DamagedError: The file is missing, or onnxruntime cannot read it.
    """
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no common class of its errors
        reason = " ".join(str(error).split())[:200]
        raise DamagedError(f"{path} cannot be read ({reason}); {_REMEDY}") from None
