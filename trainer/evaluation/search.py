"""Rank targets and search the best items in the whole catalogue with a recommender.

Models with vectors are ranked by an index and the model's added scores. Models whose score is
not an inner product are ranked by blocks of scores.

A search can be restricted to a part of the catalogue. Vectors, histories and sparse scores are then
numbered as :class:`retrieval.listed_items.ListedItems` numbers them, and results are numbered as
in the catalogue.

Legend: N items, S listed items, D width, E users, K items of a list.
"""

from collections.abc import Callable, Iterator
from copy import copy
from functools import partial

import numpy as np
import torch
from torch import Tensor

from features.dataset import EvalSplit, Ints
from retrieval.approximate_indexes import IndexStore
from retrieval.default_index import DefaultIndex
from retrieval.index_ranking import rank_with
from retrieval.indexes import Index, TopItems
from retrieval.list_metrics import SearchLists, count_recommended, search_both
from retrieval.listed_items import ListedItems
from retrieval.listed_ranks import rank_listed
from retrieval.ranking import Ranks
from retrieval.registry import make_index, parse_index
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
from trainer.evaluation.search_facts import (
    SAMPLE_SIZE,
    SearchFacts,
    describe_approximate,
    sample_users,
    unusable_index,
)
from trainer.models.base import Recommender

SequenceBatches = Callable[[slice], Sequences]
"""Function that returns the histories of a slice of users."""

_USERS_PER_BLOCK = 2048  # users whose lists are in memory
SCORED_TOGETHER = 512
"""Users that a model without vectors scores together, at most; never with users of the next 512."""


class CatalogueSearch:
    """Search in the catalogue of a recommender. The catalogue is encoded once.

    Args:
        model: The recommender. Its mode is restored.
        data: Data with the histories and the features.
        index: Kind and parameters, see :func:`retrieval.registry.make_index`; all exact indexes
            give the same results.
        batch_size: Histories encoded together.
        listed: The items that are ranked and listed; ``None``: the whole catalogue.
        store: Where trained approximate indexes are read and saved; ``None``: in memory alone.

    Raises:
        UserError: An item vector is not finite, or the index is not known.
    """

    def __init__(
        self,
        model: Recommender,
        data: TrainingData,
        *,
        index: str,
        batch_size: int,
        listed: ListedItems | None = None,
        store: IndexStore | None = None,
    ) -> None:
        listed = listed or ListedItems.of(np.ones(data.features.n_items, dtype=bool))
        with unusable_index():
            options = parse_index(index)
            options.check_items(len(listed))
        self._is_exact = options.is_exact
        self._store = store
        self._rank_choice = ""
        self.model = model
        self.data = data
        self.items_ND = encode_catalogue(model, data)
        if model.has_vectors and not model.is_sparse:
            with unusable_index():  # before the histories are encoded
                options.values(len(listed), self.items_ND.shape[1])
        self._index_name = index
        self._batch_size = batch_size
        self._list(listed)

    def _list(self, listed: ListedItems) -> None:
        self.listed = listed
        rows_S = torch.from_numpy(listed.rows_S).to(self.items_ND.device)
        is_whole = len(listed) == len(self.items_ND)
        self.listed_SD = self.items_ND if is_whole else self.items_ND[rows_S]
        self._index: Index | None = None
        self._facts: dict[int, SearchFacts] = {}

    def restricted(self, listed: ListedItems) -> "CatalogueSearch":
        """Return a search of the same vectors in another part of the catalogue."""
        search = copy(self)
        search._list(listed)
        return search

    def rank(self, users: EvalSplit, targets_E: Ints) -> Ranks:
        """Rank the target of each user, with seen items filtered and kept.

        Raises:
            UserError: A query is not finite.
        """
        numbers_E = self.listed.numbers(targets_E)
        if self.model.has_vectors and not self.model.is_sparse:
            return self._rank_vectors(users, numbers_E, self._queries(users))
        return self._rank_scores(users, numbers_E)

    def rank_and_count(self, users: EvalSplit, targets_E: Ints) -> tuple[Ranks, dict[str, Ints]]:
        """Rank as :meth:`rank`, and count the lists of 10 items that recommend each item.

        The histories are encoded once, and sparse scores are computed once.

        Args:
            users: The users, each with one list, and the end of each history.
            targets_E: The target of each user.

        Returns:
            The ranks, and ``filtered`` and ``kept`` -> (N,) counts.

        Raises:
            UserError: A query is not finite.
        """
        n_items = len(self.listed)
        numbers_E = self.listed.numbers(targets_E)
        counts = {seen: np.zeros(len(self.items_ND), np.int64) for seen in ("filtered", "kept")}

        def count(search: SearchLists, histories: SeenItems) -> None:
            for seen, items_BK in search_both(search, histories, n_items).items():
                counts[seen][self.listed.rows_S] += count_recommended(items_BK, n_items)

        blocks = _blocks(len(users.users), _USERS_PER_BLOCK)
        if self.model.is_sparse:
            ranks = []
            for rows in blocks:
                histories = histories_of(self.data.dataset, users.take(rows))
                scores = self._sparse_scores(histories, users.users[rows])
                seen = self.listed.seen(histories)
                ranks.append(rank_sparse(_part_of(scores), numbers_E[rows], n_items, seen))
                count(_sparse_lists(scores, n_items), seen)
            return Ranks.concatenate(ranks), counts
        if self.model.has_vectors:
            queries_ED = self._queries(users)
            joined = self._rank_vectors(users, numbers_E, queries_ED)
            for rows in blocks:
                histories = histories_of(self.data.dataset, users.take(rows))
                search = self._vector_lists(queries_ED[rows], histories, users.users[rows])
                count(search, self.listed.seen(histories))
            return joined, counts
        joined = self._rank_scores(users, numbers_E)
        for rows in _blocks(len(users.users), SCORED_TOGETHER):
            block = users.take(rows)
            seen = self.listed.seen(histories_of(self.data.dataset, block))
            count(_score_lists(self, block), seen)
        return joined, counts

    def _rank_vectors(self, users: EvalSplit, numbers_E: Ints, queries_ED: Tensor) -> Ranks:
        if self.model.prior is None:
            return self._rank_block(users, numbers_E, queries_ED)
        # The scores of a prior take far more memory than the queries.
        parts = _blocks(len(users.users), _USERS_PER_BLOCK)
        ranks = [self._rank_block(users.take(p), numbers_E[p], queries_ED[p]) for p in parts]
        return Ranks.concatenate(ranks)

    def _rank_block(self, users: EvalSplit, numbers_E: Ints, queries_ED: Tensor) -> Ranks:
        histories = histories_of(self.data.dataset, users)
        seen, added = self.listed.seen(histories), self._added(histories, users.users)
        if not self._is_exact:
            return rank_listed(self._made_index(), queries_ED, numbers_E, seen, added)
        return rank_with(
            self._index_name,
            queries_ED,
            self.listed_SD,
            numbers_E,
            seen,
            added,
            on_choice=partial(setattr, self, "_rank_choice"),
        )

    def _rank_scores(self, users: EvalSplit, numbers_E: Ints) -> Ranks:
        n_items = len(self.listed)
        if self.model.is_sparse:
            histories = histories_of(self.data.dataset, users)
            rows_E = np.arange(len(histories))
            return rank_sparse(
                lambda rows: self._sparse_scores(histories.take(rows_E[rows]), users.users[rows]),
                numbers_E,
                n_items,
                self.listed.seen(histories),
            )
        return _rank_score_blocks(self, users, numbers_E)

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
        exclude = None if keep_seen else self.listed.seen(histories)
        if self.model.has_vectors:
            top = self._search(self._queries(users), histories, users.users, exclude, k)
            return self._restored(top)
        with evaluation_mode(self.model):
            scorer = _scorer(self, self.batches(users))
            top = top_scores(scorer, len(users.users), len(self.listed), k, exclude)
        return self._restored(top)

    def _vector_lists(self, queries_BD: Tensor, histories: SeenItems, users_B: Ints) -> SearchLists:
        def search(rows: Ints, exclude: SeenItems | None, k: int) -> Ints:
            taken = histories.take(rows)
            return self._search(queries_BD[rows], taken, users_B[rows], exclude, k)[1]

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
        exclude = None if keep_seen else self.listed.seen(history)
        with evaluation_mode(self.model):
            if self.model.has_vectors:
                query_1D = self.model.encode_sequences(self.items_ND, sequences, self.data.features)
                top = self._search(query_1D.float(), history, np.full(1, -1), exclude, k)
                return self._restored(top)
            scorer = _scorer(self, lambda rows: sequences)
            return self._restored(top_scores(scorer, 1, len(self.listed), k, exclude))

    def _search(
        self,
        queries_ED: Tensor,
        histories: SeenItems,
        users_E: Ints,
        exclude: SeenItems | None,
        k: int,
    ) -> TopItems:
        """Return the best listed items, numbered among the listed ones, as ``exclude`` is."""
        added = self._added(histories, users_E)
        return self._made_index().search(queries_ED, k, exclude, added)

    def _made_index(self) -> Index:
        if self._index is None:
            with unusable_index():
                self._index = make_index(self._index_name, self.listed_SD, self._store)
        return self._index

    def facts(self, k: int) -> SearchFacts:
        """Return how the index has searched, and recall@k of an approximate one on a sample."""
        if not self.model.has_vectors or self.model.is_sparse:
            return SearchFacts(line="not used: the scores are not inner products")
        if not self._is_exact:
            if k not in self._facts:
                users = sample_users(self.data.dataset)
                queries = self._queries(users) if len(users.users) else self.listed_SD[:SAMPLE_SIZE]
                self._facts[k] = describe_approximate(self._made_index(), queries, k)
            return self._facts[k]
        lists = self._index.choice if isinstance(self._index, DefaultIndex) else ""
        return SearchFacts(line="; ".join(filter(None, (self._rank_choice, lists))))

    def _restored(self, top: TopItems) -> TopItems:
        return top[0], self.listed.restored(top[1])

    def _added(self, histories: SeenItems, users_E: Ints) -> SparseScores | None:
        scores = self.model.added_scores(histories, users_E)
        return None if scores is None else self.listed.scores(scores)

    def _queries(self, users: EvalSplit) -> Tensor:
        return encode_histories(self.model, self.data, self.items_ND, users, self._batch_size)

    def batches(self, users: EvalSplit) -> SequenceBatches:
        """Return a function that gathers the histories of a slice of some users."""
        return lambda rows: self.data.history_batch(users, rows, length=self.model.history)

    def _sparse_scores(self, histories: SeenItems, users_E: Ints) -> SparseScores:
        scores = self._added(histories, users_E)
        return SparseScores.empty(len(histories)) if scores is None else scores


def _scorer(
    search: CatalogueSearch, batches: SequenceBatches
) -> Callable[[slice, int, int], Tensor]:
    """Return a callback of :mod:`retrieval.score_blocks` that caches the sequences."""
    cached: dict[tuple[int, int], Sequences] = {}
    rows_S = search.listed.rows_S

    def score(rows: slice, first: int, last: int) -> Tensor:
        key = (rows.start, rows.stop)
        if key not in cached:
            cached.clear()
            cached[key] = batches(rows)
        begin, end = int(rows_S[first]), int(rows_S[last - 1]) + 1
        score_BC = search.model.score(search.items_ND, cached[key], begin, end)
        if end - begin == last - first:
            return score_BC
        return score_BC[:, torch.from_numpy(rows_S[first:last] - begin).to(score_BC.device)]

    return score


def _rank_score_blocks(search: CatalogueSearch, users: EvalSplit, numbers_E: Ints) -> Ranks:
    """Rank by scores that are not inner products, a fixed number of users at once."""
    ranks = []
    with evaluation_mode(search.model):
        for rows in _blocks(len(numbers_E), SCORED_TOGETHER):
            block = users.take(rows)
            scorer = _scorer(search, search.batches(block))
            seen = search.listed.seen(histories_of(search.data.dataset, block))
            ranks.append(rank_scores(scorer, numbers_E[rows], len(search.listed), seen))
    return Ranks.concatenate(ranks)


def _score_lists(search: CatalogueSearch, users: EvalSplit) -> SearchLists:
    def best(rows: Ints, exclude: SeenItems | None, k: int) -> Ints:
        with evaluation_mode(search.model):
            scorer = _scorer(search, search.batches(users.take(rows)))
            return top_scores(scorer, len(rows), len(search.listed), k, exclude)[1]

    return best


def _sparse_lists(scores: SparseScores, n_items: int) -> SearchLists:
    def search(rows: Ints, exclude: SeenItems | None, k: int) -> Ints:
        return top_sparse(_part_of(scores.take(rows)), len(rows), n_items, k, exclude)

    return search


def _part_of(scores: SparseScores) -> Callable[[slice], SparseScores]:
    """Return a callback of :mod:`retrieval.sparse_ranking` over scores in memory."""
    return lambda rows: scores.rows(rows.start, rows.stop)


def _blocks(users: int, size: int) -> Iterator[slice]:
    """Yield the rows of each block of users."""
    for start in range(0, users, size):
        yield slice(start, min(start + size, users))
