"""Rank targets and search the best items in the whole catalogue with a recommender.

Models with vectors are ranked by an index and the model's sparse correction. Models whose score is
not an inner product are ranked by blocks of scores.

Legend: N items, D width, E users, K items of a list.
"""

from collections.abc import Callable, Iterator

import numpy as np
from torch import Tensor

from features.dataset import EvalSplit, Ints
from retrieval.index_ranking import rank_with
from retrieval.indexes import Index, TopItems, make_index
from retrieval.list_metrics import LIST_LENGTH, count_recommended
from retrieval.ranking import Ranks
from retrieval.score_blocks import rank_scores, top_scores
from retrieval.seen_items import SeenItems
from retrieval.sparse_ranking import rank_sparse, top_sparse
from retrieval.sparse_scores import SparseScores
from trainer.data.batches import Sequences, TrainingData
from trainer.evaluation.encode import (
    encode_catalogue,
    encode_histories,
    evaluation_mode,
    histories_of,
)
from trainer.models.base import Recommender

SequenceBatches = Callable[[slice], Sequences]
"""Function that returns the histories of a slice of users."""

_USERS_PER_BLOCK = 8192  # users whose lists are in memory


class CatalogueSearch:
    """Search in the catalogue of a recommender. The catalogue is encoded once.

    Args:
        model: The recommender. Its mode is restored.
        data: Data with the histories and the features.
        index: Name in :data:`retrieval.indexes.INDEXES`; all give the same results.
        batch_size: Histories encoded together.

    Raises:
        UserError: An item vector is not finite.
    """

    def __init__(
        self, model: Recommender, data: TrainingData, *, index: str, batch_size: int
    ) -> None:
        self.model = model
        self.data = data
        self.items_ND = encode_catalogue(model, data)
        self._index_name = index
        self._batch_size = batch_size
        self._index: Index | None = None

    def rank(self, users: EvalSplit, targets_E: Ints) -> Ranks:
        """Rank the target of each user, with seen items filtered and kept.

        Raises:
            UserError: A query is not finite.
        """
        histories = histories_of(self.data.dataset, users)
        if self.model.is_sparse:
            return rank_sparse(
                self._sparse_scorer(histories), targets_E, len(self.items_ND), histories
            )
        if self.model.has_vectors:
            return rank_with(
                self._index_name,
                self._queries(users),
                self.items_ND,
                targets_E,
                histories,
                self.model.correction(histories),
            )
        with evaluation_mode(self.model):
            return rank_scores(
                self._scorer(self._batches(users)), targets_E, len(self.items_ND), histories
            )

    def best_for_users(self, users: EvalSplit, k: int, *, keep_seen: bool) -> TopItems:
        """Return the best items of users of the dataset: (E, K) scores and (E, K) items.

        Args:
            users: The users, and the end of each history.
            k: Length of a list.
            keep_seen: If true, items of the history can be recommended.

        Raises:
            UserError: A query is not finite.
        """
        histories = histories_of(self.data.dataset, users)
        exclude = None if keep_seen else histories
        if self.model.has_vectors:
            return self._search(self._queries(users), histories, exclude, k)
        with evaluation_mode(self.model):
            scorer = self._scorer(self._batches(users))
            return top_scores(scorer, len(users.users), len(self.items_ND), k, exclude)

    def count_recommended(self, users: EvalSplit) -> dict[str, Ints]:
        """Return in how many lists of 10 items each item of the catalogue is.

        Args:
            users: The users, each with one list, and the end of each history.

        Returns:
            ``filtered`` and ``kept`` -> (N,) counts.

        Raises:
            UserError: A query is not finite.
        """
        n_items = len(self.items_ND)
        counts = {seen: np.zeros(n_items, np.int64) for seen in ("filtered", "kept")}
        for block in _blocks(users):
            search = self._list_search(block)
            exclude = {"filtered": histories_of(self.data.dataset, block), "kept": None}
            for seen, counts_N in counts.items():
                counts_N += count_recommended(search(exclude[seen]), n_items)
        return counts

    def _list_search(self, users: EvalSplit) -> Callable[[SeenItems | None], Ints]:
        """Return a function that returns the lists (E, 10) without the seen items it is given."""
        histories, n_items = histories_of(self.data.dataset, users), len(self.items_ND)
        if self.model.is_sparse:
            sparse = self._sparse_scorer(histories)
            return lambda exclude: top_sparse(sparse, len(histories), n_items, LIST_LENGTH, exclude)
        if self.model.has_vectors:
            queries_ED = self._queries(users)
            return lambda exclude: self._search(queries_ED, histories, exclude, LIST_LENGTH)[1]

        def search(exclude: SeenItems | None) -> Ints:
            with evaluation_mode(self.model):
                scorer = self._scorer(self._batches(users))
                return top_scores(scorer, len(histories), n_items, LIST_LENGTH, exclude)[1]

        return search

    def best_for_history(
        self, sequences: Sequences, history: SeenItems, k: int, *, keep_seen: bool
    ) -> TopItems:
        """Return the best items of one history: (1, K) scores and (1, K) items.

        Args:
            sequences: The last items of the history, which the model reads.
            history: The whole history.
            k: Length of the list.
            keep_seen: If true, items of the history can be recommended.
        """
        exclude = None if keep_seen else history
        with evaluation_mode(self.model):
            if self.model.has_vectors:
                query_1D = self.model.encode_sequences(self.items_ND, sequences, self.data.features)
                return self._search(query_1D.float(), history, exclude, k)
            scorer = self._scorer(lambda rows: sequences)
            return top_scores(scorer, 1, len(self.items_ND), k, exclude)

    def _search(
        self, queries_ED: Tensor, histories: SeenItems, exclude: SeenItems | None, k: int
    ) -> TopItems:
        if self._index is None:
            self._index = make_index(self._index_name, self.items_ND)
        correction = self.model.correction(histories)
        return self._index.search(queries_ED, k, exclude, correction)

    def _queries(self, users: EvalSplit) -> Tensor:
        return encode_histories(self.model, self.data, self.items_ND, users, self._batch_size)

    def _batches(self, users: EvalSplit) -> SequenceBatches:
        return lambda rows: self.data.history_batch(users, rows, length=self.model.history)

    def _sparse_scorer(self, histories: SeenItems) -> Callable[[slice], SparseScores]:
        """Return a callback of :func:`retrieval.sparse_ranking.rank_sparse`."""
        rows_E = np.arange(len(histories))

        def score(rows: slice) -> SparseScores:
            scores = self.model.correction(histories.take(rows_E[rows]))
            return SparseScores.empty(len(rows_E[rows])) if scores is None else scores

        return score

    def _scorer(self, batches: SequenceBatches) -> Callable[[slice, int, int], Tensor]:
        """Return a callback of :mod:`retrieval.score_blocks` that caches the sequences."""
        cached: dict[tuple[int, int], Sequences] = {}

        def score(rows: slice, first: int, last: int) -> Tensor:
            key = (rows.start, rows.stop)
            if key not in cached:
                cached.clear()
                cached[key] = batches(rows)
            return self.model.score(self.items_ND, cached[key], first, last)

        return score


def _blocks(users: EvalSplit) -> Iterator[EvalSplit]:
    """Yield the users in blocks."""
    for start in range(0, len(users.users), _USERS_PER_BLOCK):
        rows = slice(start, start + _USERS_PER_BLOCK)
        yield EvalSplit(
            users=users.users[rows], starts=users.starts[rows], targets=users.targets[rows]
        )
