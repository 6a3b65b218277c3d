"""From a trained run to lists of items: for its users, for any history, for everybody.

A user's query is made of the whole history, held-out items included: nothing is held back from a
recommendation. The catalogue is every item of the preparation, including items without
interactions: a model of features has a vector for each of them.

Legend: N items, U users, B users of one block, L items of a history, K recommendations of a user.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from features.dataset import EvalSplit, Ints, load_items, load_user_ids
from features.errors import UserError
from features.table_files import table_file_writer
from features.warehouse import Warehouse
from retrieval.approximate_indexes import ApproximateIndex
from retrieval.default_index import DefaultIndex
from retrieval.indexes import Index, TopItems
from retrieval.listed_items import ListedItems
from retrieval.registry import make_index, parse_index
from retrieval.seen_items import SeenItems
from trainer.checkpoint import load_weights
from trainer.data.batches import Sequences
from trainer.evaluation.saved_indexes import INDEXES, SavedIndexes
from trainer.evaluation.search import CatalogueSearch
from trainer.evaluation.search_facts import (
    SAMPLE_SIZE,
    SearchFacts,
    describe_approximate,
    unusable_index,
)
from trainer.runs.choice import Choice, with_new_items
from trainer.runs.run import Run

_BLOCK = 4096  # most users encoded, searched and written together
_ROWS_PER_BLOCK = 2**17  # most rows of them, but for a list that is longer
_EXAMPLES = 3  # ids that an error names

RECOMMENDATIONS = pa.schema(
    [
        pa.field("user", pa.int32(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),  # from 1
        pa.field("item", pa.int32(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
    ]
)
"""Columns that :func:`write_all` writes: K rows a user, fewer if fewer items are left."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Suggestion:
    """One item of a list."""

    rank: int
    item_id: str
    text: str | None
    score: float
    """Score of the model, in general an inner product; of similar items, the cosine."""
    cold: bool
    """True if the item has fewer than 10 training interactions."""


class Predictor:
    """A run with its best weights and the vectors of its catalogue.

    Args:
        warehouse: Warehouse with the run's dataset.
        run: The run; its weights are loaded.
        index: Kind and parameters, see :func:`retrieval.registry.make_index`. Trained approximate
            indexes are kept in the run's folder.
        choice: The items that can be recommended; by default all that the run can rank.
        on_stage: Called with one line before an approximate index is trained, and if it cannot be
            saved.

    Raises:
        UserError: The run is a pre-training, its checkpoint cannot be used, or no item is left.
    """

    def __init__(
        self,
        warehouse: Warehouse,
        run: Run,
        *,
        index: str,
        choice: Choice | None = None,
        on_stage: Callable[[str], object] = lambda stage: None,
    ) -> None:
        run.check_recommends()
        if run.joint is None:
            load_weights(run.weights, run.model, run.spec.identity())
        run.model.eval()
        self.warehouse = warehouse
        self.run = run
        self.dataset = run.data.dataset
        self.index = index
        self._store = SavedIndexes(run.folder / INDEXES, on_stage)
        self._similar_index: Index | None = None
        table = load_items(warehouse, run.spec.dataset, ["item_id", "text"])
        self.item_ids = table.column("item_id").combine_chunks()
        self.texts = table.column("text")
        if run.joint is not None:
            rows = run.joint.rows_of_later()
            self.item_ids, self.texts = run.joint.ids, self.texts.take(rows)
        choice = choice or Choice()
        is_listed_N = run.is_listed() & choice.allowed(self.item_ids)
        if not is_listed_N.any():
            raise UserError("no item is left to recommend; allow more items")
        self.search = CatalogueSearch(
            run.model,
            run.data,
            index=index,
            batch_size=run.config.eval_batch,
            listed=ListedItems.of(is_listed_N),
            store=self._store,
        )
        self._choice = choice
        self._is_rare_N = is_listed_N & (self.dataset.train_counts < choice.new_below)
        self._rare = None
        if choice.new_share and self._is_rare_N.any():
            self._rare = self.search.restricted(ListedItems.of(self._is_rare_N))

    # -- users, items and histories ------------------------------------------------------------

    def user(self, user_id: str) -> int:
        """Return the index of a user.

        Raises:
            UserError: No user has the id.
        """
        ids = load_user_ids(self.warehouse, self.run.spec.dataset)
        index = index_of(ids, user_id)
        if index < 0:
            raise UserError(
                f"dataset {self.run.spec.dataset!r} has no user {user_id!r}"
                f" ({name_examples(ids, 'users')}); for a new user give"
                " --history ITEM_ID,ITEM_ID,..."
            )
        return index

    def item(self, item_id: str) -> int:
        """Return the index of an item.

        Raises:
            UserError: No item of the catalogue has the id.
        """
        index = index_of(self.item_ids, item_id)
        if index < 0:
            core = self.dataset.info.k_core
            left_out = f"; the {core}-core left rare items out" if core > 1 else ""
            raise UserError(
                f"the catalogue of {self.run.spec.dataset!r} has no item {item_id!r}"
                f" ({name_examples(self.item_ids, 'items')}{left_out}); give an id of mmrec sql"
                f" \"SELECT item_id, text FROM items WHERE dataset = '{self.run.spec.dataset}'\""
            )
        return index

    def history(self, user: int) -> Ints:
        """Return all items of a user's history, oldest first: (L,)."""
        offsets = self.dataset.offsets
        return self.dataset.items[offsets[user] : offsets[user + 1]].astype(np.int64)

    # -- lists ---------------------------------------------------------------------------------

    def recommend(
        self, history: Sequence[str], k: int = 10, *, keep_seen: bool = False
    ) -> list[Suggestion]:
        """Recommend for a history of item ids, oldest first, at least one.

        Args:
            history: Ids of items of the catalogue.
            k: Length of the list.
            keep_seen: Let items of the history be recommended again.

        Raises:
            UserError: The catalogue has no item of an id.
        """
        items = [self.item(item_id) for item_id in history]
        return self.named(self.for_history(items, k, keep_seen=keep_seen))

    def for_history(
        self, items: Sequence[int] | Ints, k: int, *, keep_seen: bool = False
    ) -> TopItems:
        """Recommend for one history of any user.

        Args:
            items: (L,) items of the history, oldest first, at least one.
            k: Length of the list.
            keep_seen: Let items of the history be recommended again.

        Returns:
            (1, K) scores and (1, K) items, see :meth:`retrieval.indexes.Index.search`.
        """
        history = np.asarray(items, dtype=np.int64)
        last = torch.from_numpy(history[-self.run.model.history :]).to(self.run.data.device)
        sequences = Sequences(
            items_BL=last[None],
            lengths_B=last.new_tensor([len(last)]),
            users_B=last.new_tensor([-1]),
        )
        seen = SeenItems(items=history, offsets=np.array([0, len(history)]))
        return self._lists(
            lambda search, length: search.best_for_history(
                sequences, seen, length, keep_seen=keep_seen
            ),
            k,
        )

    def for_users(self, users: Ints, k: int, *, keep_seen: bool = False) -> TopItems:
        """Recommend for users of the dataset, who are encoded and searched together.

        Args:
            users: (B,) indices of users.
            k: Length of a list.
            keep_seen: Let items of the history be recommended again.

        Returns:
            (B, K) scores and (B, K) items; -1 after the last item of a list that is too short.
        """
        offsets = self.dataset.offsets
        split = EvalSplit(users=users, starts=offsets[users], targets=offsets[users + 1])
        return self._lists(
            lambda search, length: search.best_for_users(split, length, keep_seen=keep_seen), k
        )

    def _lists(self, search: Callable[[CatalogueSearch, int], TopItems], k: int) -> TopItems:
        """Return the best items of each history, with the least share of new ones."""
        top = search(self.search, self._list_length(k))
        least = self._choice.least_new(top[1].shape[1])
        if self._rare is None or not least:
            return top
        rare = search(self._rare, min(least, len(self._rare.listed)))
        return with_new_items(top, rare, self._is_rare_N)

    def similar(self, item: int, k: int) -> TopItems:
        """Return the items with the most similar vectors: (1, K) cosines and (1, K) items.

        Raises:
            UserError: The model has no item vectors.
        """
        if not self.run.model.has_vectors or self.search.items_ND.shape[1] < 2:
            raise UserError(
                f"{self.run.spec.model} has no item vectors, so --similar compares nothing;"
                " give --user or --history"
            )
        listed = self.search.listed
        itself = listed.seen(SeenItems(items=np.array([item]), offsets=np.array([0, 1])))
        query_1D = torch.nn.functional.normalize(self.search.items_ND[item : item + 1])
        index = self._index_of_cosines()
        scores, numbers = index.search(query_1D, self._list_length(k), itself)
        return scores, listed.restored(numbers)

    def _index_of_cosines(self) -> Index:
        if self._similar_index is None:
            unit_SD = torch.nn.functional.normalize(self.search.listed_SD, dim=1)
            with unusable_index():
                self._similar_index = make_index(self.index, unit_SD, self._store)
        return self._similar_index

    def similar_facts(self, k: int) -> SearchFacts:
        """Return how :meth:`similar` searched, and recall@k of an approximate index on a sample."""
        index = self._index_of_cosines()
        if isinstance(index, ApproximateIndex):
            return describe_approximate(index, index.item_ND[:SAMPLE_SIZE], k)
        return SearchFacts(line=index.choice if isinstance(index, DefaultIndex) else "")

    def search_facts(self, k: int) -> SearchFacts:
        """Return how lists were searched, and recall@k of an approximate index on a sample."""
        return self.search.facts(self._list_length(k))

    def named(self, top: TopItems) -> list[Suggestion]:
        """Return the first list with ids and texts, for people."""
        scores, items = top[0][0], top[1][0]
        listed = items[items >= 0]
        return [
            Suggestion(
                rank=rank,
                item_id=self.item_ids[item].as_py(),
                text=self.texts[item].as_py(),
                score=float(score),
                cold=bool(self.dataset.cold[item]),
            )
            for rank, (item, score) in enumerate(zip(listed, scores, strict=False), 1)
        ]

    def _list_length(self, k: int) -> int:
        if k < 1:
            raise UserError(f"--k {k} is not the length of a list; give at least 1")
        return min(k, len(self.search.listed))


def write_all(
    predictor: Predictor,
    path: Path,
    k: int,
    *,
    keep_seen: bool = False,
    on_users: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write the lists of every user into one file, whole or not at all.

    Users are encoded and searched block by block, and each block is a row group: apart from the
    user ids, memory grows neither with the number of users nor with the length of the lists. A
    Parquet file contains the index, and the recall of an approximate one, in its metadata.

    Args:
        predictor: The run.
        path: The file, of the schema ``RECOMMENDATIONS``; CSV or JSON Lines if it ends in
            ``.csv`` or ``.jsonl``, else Parquet.
        k: Length of a list.
        keep_seen: Let items of the history be recommended again.
        on_users: Called with the numbers of users that are done, and of all users.

    Returns:
        The number of rows.
    """
    total, rows = predictor.dataset.info.users, 0
    metadata = {"index": predictor.index}
    if not parse_index(predictor.index).is_exact:
        metadata["recall"] = json.dumps(predictor.search_facts(k).recall)
    schema = RECOMMENDATIONS.with_metadata(metadata)
    with table_file_writer(path, schema) as write:
        for done, block in _blocks(predictor, k, keep_seen):
            write(block.cast(schema))
            rows += len(block)
            on_users(done, total)
    return rows


def _blocks(predictor: Predictor, k: int, keep_seen: bool) -> Iterator[tuple[int, pa.Table]]:
    user_ids = load_user_ids(predictor.warehouse, predictor.run.spec.dataset)
    total = predictor.dataset.info.users
    has_history = np.diff(predictor.dataset.offsets) > 0
    step = max(1, min(_BLOCK, _ROWS_PER_BLOCK // min(k, len(predictor.item_ids))))
    for start in range(0, total, step):
        stop = min(start + step, total)
        users = start + np.flatnonzero(has_history[start:stop])
        scores_BK, items_BK = predictor.for_users(users, k, keep_seen=keep_seen)
        is_item_BK = items_BK >= 0
        row, column = is_item_BK.nonzero()
        user, item = pa.array(users[row], pa.int32()), pa.array(items_BK[is_item_BK], pa.int32())
        columns = {
            "user": user,
            "user_id": user_ids.take(user),
            "rank": pa.array(column + 1, pa.int32()),
            "item": item,
            "item_id": predictor.item_ids.take(item),
            "score": pa.array(scores_BK[is_item_BK]),
        }
        yield stop, pa.table(columns).cast(RECOMMENDATIONS)


def index_of(ids: pa.Array | pa.ChunkedArray, text: str) -> int:
    """Return the index of an id, -1 if it is not among the ids.

    ``pyarrow.compute.index`` converts the id to a scalar, and pyarrow's first conversion imports
    pandas where pandas is installed, which takes 0.3 CPU s.
    """
    chunks = ids.chunks if isinstance(ids, pa.ChunkedArray) else [ids]
    start = 0
    for chunk in chunks:
        values: list[str] = chunk.to_pylist()
        if text in values:
            return start + values.index(text)
        start += len(values)
    return -1


def name_examples(ids: pa.Array | pa.ChunkedArray, kind: str) -> str:
    """Return the number of some ids and the first ones, for messages."""
    examples = ", ".join(ids.slice(0, _EXAMPLES).to_pylist())
    return f"{len(ids):,} {kind}, such as {examples}"
