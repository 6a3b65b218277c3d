"""Compute exact ranks with an index.

Shape suffixes: U users, B users of one block, F fetched candidates, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from retrieval.blocks import for_each_block, strict_fp32
from retrieval.default_index import (
    DefaultIndex,
    measured_ratio,
)
from retrieval.exact_scores import FP32_ROUNDOFF, TargetScores, as_indices
from retrieval.flat_index import LONGEST_LIST, FaissIndex
from retrieval.listed_ranks import rank_listed
from retrieval.pairs import CorrectedPairs, contains, corrected_pairs, most_pairs, seen_pairs
from retrieval.ranking import Ranks, count_ranks
from retrieval.registry import exact_index, make_index, parse_index
from retrieval.seen_items import SeenItems
from retrieval.sparse_scores import SparseScores

if TYPE_CHECKING:
    from retrieval.exact_scores import Indices, Matrix
    from retrieval.pairs import Pairs

    Ints = npt.NDArray[np.int64]

_CUTOFF = 50  # the largest default cut-off of the metrics
_SAVED = 0.1  # least share of the time that flat search must save
_LEAST_SHARE = 0.6  # of the ranks that flat search must decide, or it cannot save time
_SAMPLED_USERS = 64
_MEASURED_USERS, _MEASURED_ITEMS = 256, 2**15  # counting is slower for fewer users at once
WORTH_MEASURING = 4 * 10**8
"""Least number of scores for which the ways to rank are measured, which takes up to 4% of the time
of so many scores."""


def rank_with(
    name: str,
    queries: Matrix,
    items: Matrix,
    targets: Indices,
    exclude: SeenItems | None = None,
    correction: SparseScores | None = None,
    *,
    on_choice: Callable[[str], object] = lambda choice: None,
) -> Ranks:
    """Rank each user's target with an index; all exact indexes give the ranks of `rank`.

    `torch` counts the items (`retrieval.ranking.rank`). `faiss:flat` fetches the top of each user's
    list: 50 items, the largest of the default cut-offs, plus as many as the user has seen or a
    correction lowers (at most 2,048 in all). Corrected items are compared with the target directly.
    If the last fetched item scores below the target by more than the error bound, the list decides
    the target's rank, and canonical scores decide close pairs as in `rank`. All other targets are
    ranked by counting. `faiss` measures whether flat search saves time, which it does if most
    targets are near the top. An approximate index ranks as `retrieval.listed_ranks.rank_listed`.

    Args:
        name: Kind and parameters of an index, see `retrieval.registry.make_index`.
        queries: (U, D) fp32.
        items: (N, D) fp32, on the same device.
        targets: (U,) the item that each user interacted with.
        exclude: Items that the filtered rank leaves out; none when None.
        correction: Scores that are added to the inner products; none when None.
        on_choice: Called by `faiss` with the chosen way and the reason.

    Raises:
        IndexNameError: The index is unknown, or does not fit the items.
        ValueError: As `rank`.
    """
    options = parse_index(name)
    if not options.is_exact:
        index = make_index(name, items)
        return rank_listed(index, queries, as_indices("targets", targets), exclude, correction)
    target_scores = TargetScores(queries, items, targets, correction)
    if exclude is not None:
        exclude.check(len(target_scores.query_UD), len(target_scores.item_ND))
    ranking = _Ranking(target_scores, exclude, correction)
    everyone = np.arange(len(target_scores.query_UD))
    kind = exact_index(options)
    if kind is DefaultIndex:
        ranking.rank_by_choice(everyone, on_choice)
    elif isinstance(kind, type) and issubclass(kind, FaissIndex):
        ranking.rank_by_lists(everyone, kind(target_scores.item_ND))
    else:
        ranking.count(everyone)
    return Ranks(kept=ranking.kept, filtered=ranking.filtered)


class _Ranking:
    """The ranks of all users, filled in by several ways.

    Args:
        target_scores: Scores of the targets.
        exclude: Items that the filtered rank leaves out; none when None.
        correction: Scores that are added to the inner products; none when None.
    """

    def __init__(
        self,
        target_scores: TargetScores,
        exclude: SeenItems | None,
        correction: SparseScores | None,
    ) -> None:
        self._target_scores, self._exclude, self._correction = target_scores, exclude, correction
        users, self._count = len(target_scores.query_UD), len(target_scores.item_ND)
        self.kept, self.filtered = np.zeros(users, np.int64), np.zeros(users, np.int64)

    def _of(self, users: Ints) -> tuple[TargetScores, SeenItems | None, SparseScores | None]:
        """Return target scores, seen items and corrections of some users."""
        if len(users) == len(self.kept) and (users == np.arange(len(users))).all():
            return self._target_scores, self._exclude, self._correction
        return (
            self._target_scores.take(users),
            None if self._exclude is None else self._exclude.take(users),
            None if self._correction is None else self._correction.take(users),
        )

    def count(self, users: Ints) -> None:
        """Rank the targets of some users by counting."""
        if len(users):
            ranks = count_ranks(*self._of(users))
            self.kept[users], self.filtered[users] = ranks.kept, ranks.filtered

    def rank_by_choice(self, users: Ints, on_choice: Callable[[str], object]) -> None:
        """Rank the targets by flat search if it saves time, else by counting."""
        is_on_cpu = self._target_scores.device.type == "cpu"
        if not is_on_cpu or len(users) * self._count < WORTH_MEASURING:
            on_choice(f"ranks by counting ({'few scores' if is_on_cpu else 'on a GPU'})")
            self.count(users)
            return
        share = self._share_near_top()
        if share < _LEAST_SHARE:
            on_choice(f"ranks by counting (flat search would decide about {share:.0%} of them)")
            self.count(users)
            return
        ratio = self._measure()
        facts = f"flat search takes {ratio:.2f} of its time and decides about {share:.0%}"
        if share < ratio + _SAVED:
            on_choice(f"ranks by counting ({facts})")
            self.count(users)
        else:
            on_choice(f"ranks by flat search ({facts.replace('its time', 'the time of counting')})")
            self.rank_by_lists(users, FaissIndex(self._target_scores.item_ND))

    def _share_near_top(self) -> float:
        """Return the estimated share of targets among the first items, by a sample of items."""
        users = np.linspace(0, len(self.kept) - 1, _SAMPLED_USERS).astype(np.int64)
        part = self._target_scores.take(users)
        sample = part.item_ND[:: -(-self._count // _MEASURED_ITEMS)]
        above_U = (part.query_UD @ sample.T > part.score_U[:, None]).sum(1)
        return float((above_U * (self._count / len(sample)) <= _CUTOFF).double().mean())

    def _measure(self) -> float:
        """Return the time of flat search over that of counting."""
        items = self._target_scores.item_ND[:_MEASURED_ITEMS]
        query_UD = self._target_scores.query_UD[:_MEASURED_USERS]
        part = TargetScores(query_UD, items, np.zeros(len(query_UD), np.int64))
        index, everyone = FaissIndex(items), slice(0, len(query_UD))
        none = seen_pairs(None, everyone, len(items), part.device)
        with strict_fp32(part.device):
            return measured_ratio(
                "ranks",
                part.dim,
                lambda: _ranks_from_lists(part, index, everyone, none, None),
                lambda: count_ranks(part, None, None),
                rounds=1,
            )

    def rank_by_lists(self, users: Ints, index: FaissIndex) -> None:
        """Rank the targets by the top of each user's list; count where it does not decide the rank.

        Users are sorted by the length of the list that they need, so that a user with many seen
        items does not lengthen the lists of others. The targets of users who need more than
        `LONGEST_LIST` are counted at once.
        """
        length_U = np.full(len(self.kept), _CUTOFF)
        if self._exclude is not None:
            length_U += np.diff(self._exclude.offsets)
        if self._correction is not None:
            row_P, _, value_P = self._correction.entries(0, len(self.kept))
            length_U += np.bincount(row_P[value_P < 0], minlength=len(self.kept))
        length_U = np.minimum(length_U, self._count)
        is_listed = length_U[users] <= LONGEST_LIST
        listed = users[is_listed]
        listed = listed[np.argsort(length_U[listed], kind="stable")]
        target_scores, exclude, correction = self._of(listed)
        kept, filtered = np.zeros(len(listed), np.int64), np.zeros(len(listed), np.int64)

        def rank_block(part: slice) -> None:
            seen = seen_pairs(exclude, part, self._count, target_scores.device)
            corrected = corrected_pairs(correction, part, seen, self._count, target_scores.target_U)
            kept[part], filtered[part] = _ranks_from_lists(
                target_scores, index, part, seen, corrected
            )

        with strict_fp32(target_scores.device):
            for_each_block(rank_block, len(listed), 1024, target_scores.device)
        ranks = Ranks.of(kept, filtered, target_scores.target_U.cpu().numpy(), exclude)
        self.kept[listed], self.filtered[listed] = ranks.kept, ranks.filtered
        self.count(np.sort(np.concatenate([users[~is_listed], listed[kept == 0]])))


def _ranks_from_lists(
    target_scores: TargetScores,
    faiss_index: FaissIndex,
    users: slice,
    seen: Pairs,
    corrected: CorrectedPairs | None,
) -> tuple[Ints, Ints]:
    """Return (B,) kept and (B,) filtered ranks; 0 where the list does not decide the rank."""
    import torch

    count = len(target_scores.item_ND)
    may_lead = seen if corrected is None else corrected.with_seen(seen, corrected.value < 0)
    fetch = min(count, _CUTOFF + most_pairs(may_lead[0]))
    score_BF, item_BF = faiss_index.fetch(target_scores.query_UD[users], fetch)
    ahead_BF = score_BF.double() - target_scores.score_U[users, None]
    margin_B = target_scores.margin(users, target_scores.item_length_N.max(), FP32_ROUNDOFF)[
        :, None
    ]
    is_decided_B = (ahead_BF[:, -1:] < -margin_B)[:, 0]
    if fetch == count:
        is_decided_B = torch.ones_like(is_decided_B)
    is_rival_BF = (item_BF != target_scores.target_U[users, None]) & is_decided_B[:, None]
    if corrected is not None:
        is_rival_BF &= ~contains((corrected.row, corrected.item), item_BF, count)
    above_BF = (ahead_BF > margin_B) & is_rival_BF
    row_P, column_P = ((ahead_BF.abs() <= margin_B) & is_rival_BF).nonzero(as_tuple=True)
    above_BF[row_P, column_P] = target_scores.at_least(
        row_P + users.start, item_BF[row_P, column_P]
    )
    above_B = above_BF.sum(1)
    seen_above_B = (above_BF & contains(seen, item_BF, count)).sum(1)
    if corrected is not None:
        pairs = corrected.where(is_decided_B[corrected.row])
        above_P = target_scores.at_least(pairs.row + users.start, pairs.item, pairs.value)
        above_B += pairs.row[above_P].bincount(minlength=len(above_B))
        seen_above_B += pairs.row[above_P & pairs.is_seen].bincount(minlength=len(above_B))
    kept_B = (1 + above_B) * is_decided_B
    return kept_B.cpu().numpy(), (kept_B - seen_above_B).cpu().numpy()
