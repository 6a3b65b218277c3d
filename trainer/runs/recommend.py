"""From a trained run to lists of items: for its users, for a history of anyone, for everybody.

A user's query is made of the whole history, held-out items included: nothing is held back from a
recommendation. The catalogue are all items of the preparation, also those that nobody has had: a
recommender of features has a vector for each.

Legend: N items, D width, U users, B users of one block, K recommendations a user.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from features.atomic_files import atomic_write
from features.dataset import EvalSplit, Ints, load_items, load_user_ids
from features.errors import UserError
from features.warehouse import Warehouse
from retrieval.indexes import Index, TopItems, make_index
from retrieval.seen_items import SeenItems
from trainer.checkpoint import load_weights
from trainer.data.batches import Sequences
from trainer.evaluation.encode import encode_catalogue, encode_histories, histories_of
from trainer.runs.run import Run

_BLOCK = 4096  # users encoded, searched and written together
_SUCH_AS = 3  # ids that an error names

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
"""What :func:`write_all` writes: K rows a user, fewer where fewer items are left."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Suggestion:
    """One item of a list."""

    rank: int
    item_id: str
    text: str | None
    score: float
    """Inner product of the query and the item's vector; of similar items, their cosine."""
    cold: bool
    """Whether the item has fewer than 10 training interactions."""


class Predictor:
    """A run with its best weights and the vectors of its catalogue, ready to be asked."""

    def __init__(self, warehouse: Warehouse, run: Run, *, index: str) -> None:
        """Load the weights and encode the catalogue.

        Args:
            warehouse: Holds the run's dataset.
            run: The run.
            index: Name in ``retrieval.indexes.INDEXES``.

        Raises:
            UserError: It is a pre-training, or its checkpoint cannot be used.
        """
        run.check_recommends()
        load_weights(run.weights, run.model, run.spec.identity())
        run.model.eval()
        self.run = run
        self.dataset = run.data.dataset
        self.items_ND = encode_catalogue(run.model, run.data)
        self.warehouse = warehouse
        self._index_name = index
        table = load_items(warehouse, run.spec.dataset, ["item_id", "text"])
        self.item_ids = table.column("item_id").combine_chunks()
        self._texts = table.column("text")

    @cached_property
    def _index(self) -> Index:
        return make_index(self._index_name, self.items_ND)

    # -- who and what --------------------------------------------------------------------------

    def user(self, user_id: str) -> int:
        """The index of a user.

        Raises:
            UserError: There is none of that id.
        """
        ids = load_user_ids(self.warehouse, self.run.spec.dataset)
        found = pc.index(ids, user_id).as_py()
        if found < 0:
            raise UserError(
                f"dataset {self.run.spec.dataset!r} has no user {user_id!r}"
                f" ({_such_as(ids, 'users')}); for a new one give --history ITEM_ID,ITEM_ID,..."
            )
        return int(found)

    def item(self, item_id: str) -> int:
        """The index of an item.

        Raises:
            UserError: The catalogue has none of that id.
        """
        found = pc.index(self.item_ids, item_id).as_py()
        if found < 0:
            core = self.dataset.info.k_core
            left_out = f"; the {core}-core left rare ones out" if core > 1 else ""
            raise UserError(
                f"the catalogue of {self.run.spec.dataset!r} has no item {item_id!r}"
                f" ({_such_as(self.item_ids, 'items')}{left_out}); give an id of mmrec sql"
                f" \"SELECT item_id, text FROM items WHERE dataset = '{self.run.spec.dataset}'\""
            )
        return int(found)

    def history(self, user: int) -> Ints:
        """(L,) everything that a user has had, the oldest first."""
        offsets = self.dataset.offsets
        return self.dataset.items[offsets[user] : offsets[user + 1]].astype(np.int64)

    # -- lists ---------------------------------------------------------------------------------

    def for_history(
        self, items: Sequence[int] | Ints, k: int, *, keep_seen: bool = False
    ) -> TopItems:
        """Recommend for one history, whoever has it.

        Args:
            items: (L,) its items, the oldest first, at least one.
            k: Length of the list.
            keep_seen: Whether items of the history may be recommended.

        Returns:
            (1, K) scores and (1, K) items, see :meth:`retrieval.indexes.Index.search`.
        """
        flat = np.asarray(items, dtype=np.int64)
        last = torch.from_numpy(flat[-self.run.model.history :]).to(self.run.data.device)
        sequences = Sequences(items_BL=last[None], lengths_B=last.new_tensor([len(last)]))
        model, features = self.run.model, self.run.data.features
        with torch.no_grad():
            query_1D = model.encode_sequences(self.items_ND, sequences, features)
        seen = SeenItems(items=flat, offsets=np.array([0, len(flat)]))
        return self._index.search(query_1D.float(), self._most(k), None if keep_seen else seen)

    def for_users(self, users: Ints, k: int, *, keep_seen: bool = False) -> TopItems:
        """Recommend for (B,) users of the dataset; they are encoded and searched together.

        Returns:
            (B, K) scores and (B, K) items, -1 behind the last one that is left.
        """
        offsets = self.dataset.offsets
        held = EvalSplit(users=users, starts=offsets[users], targets=offsets[users + 1])
        batch = self.run.config.eval_batch
        queries_BD = encode_histories(self.run.model, self.run.data, self.items_ND, held, batch)
        seen = None if keep_seen else histories_of(self.dataset, held)
        return self._index.search(queries_BD, self._most(k), seen)

    def similar(self, item: int, k: int) -> TopItems:
        """The items whose vectors point the same way: (1, K) cosines and (1, K) items."""
        unit_ND = torch.nn.functional.normalize(self.items_ND, dim=1)
        itself = SeenItems(items=np.array([item]), offsets=np.array([0, 1]))
        query_1D = unit_ND[item : item + 1]
        return make_index(self._index_name, unit_ND).search(query_1D, self._most(k), itself)

    def named(self, found: TopItems) -> list[Suggestion]:
        """The first list of what was found, for people."""
        scores, items = found[0][0], found[1][0]
        left = items[items >= 0]
        texts = self._texts.take(pa.array(left)).to_pylist()
        return [
            Suggestion(
                rank=rank,
                item_id=self.item_ids[item].as_py(),
                text=text,
                score=float(score),
                cold=bool(self.dataset.cold[item]),
            )
            for rank, (item, text, score) in enumerate(zip(left, texts, scores, strict=False), 1)
        ]

    def _most(self, k: int) -> int:
        if k < 1:
            raise UserError(f"--k {k} is no length of a list; give at least 1")
        return min(k, len(self.items_ND))


def write_all(
    adviser: Predictor,
    path: Path,
    k: int,
    *,
    keep_seen: bool = False,
    on_users: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write the lists of every user into one Parquet file, whole or not at all.

    Users are encoded and searched block by block, and each block is a row group: memory does not
    grow with their number, but for their ids.

    Args:
        adviser: Whom to ask.
        path: The file, of the schema ``RECOMMENDATIONS``.
        k: Length of a list.
        keep_seen: Whether items that a user has had may be recommended.
        on_users: Told how many users are done, and of how many.

    Returns:
        The number of rows.
    """
    total, rows = adviser.dataset.info.users, 0
    with atomic_write(path) as beside, pq.ParquetWriter(beside, RECOMMENDATIONS) as writer:
        for done, block in _blocks(adviser, k, keep_seen):
            writer.write_table(block)
            rows += len(block)
            on_users(done, total)
    return rows


def _blocks(adviser: Predictor, k: int, keep_seen: bool) -> Iterator[tuple[int, pa.Table]]:
    user_ids = load_user_ids(adviser.warehouse, adviser.run.spec.dataset)
    total = adviser.dataset.info.users
    for start in range(0, total, _BLOCK):
        users = np.arange(start, min(start + _BLOCK, total))
        scores_BK, items_BK = adviser.for_users(users, k, keep_seen=keep_seen)
        there_BK = items_BK >= 0
        row, column = there_BK.nonzero()
        user, item = pa.array(users[row], pa.int32()), pa.array(items_BK[there_BK], pa.int32())
        columns = {
            "user": user,
            "user_id": user_ids.take(user),
            "rank": pa.array(column + 1, pa.int32()),
            "item": item,
            "item_id": adviser.item_ids.take(item),
            "score": pa.array(scores_BK[there_BK]),
        }
        yield start + len(users), pa.table(columns).cast(RECOMMENDATIONS)


def _such_as(ids: pa.Array | pa.ChunkedArray, what: str) -> str:
    some = ", ".join(ids.slice(0, _SUCH_AS).to_pylist())
    return f"{len(ids):,} {what}, such as {some}"
