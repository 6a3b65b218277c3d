"""Sampled items.

Legend: M rows (predicted positions), N items, K given items, X drawn items, J training pairs of
user and item.
"""

import numpy as np
import torch
from torch import Tensor

from trainer.data.batches import TrainSet


def sample_unseen(
    train: TrainSet, users_M: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw one item for each row, uniformly from the items that the row's user has not seen.

    Hidden items are not drawn. The draw is exact, without rejection: a rank among the user's unseen
    items is drawn, and a bisection of the user's seen items finds the item of that rank.

    Args:
        train: The training set.
        users_M: (M,) int64, on the CPU.
        generator: On the CPU.

    Returns:
        (M,) int64 items, and (M,) bool, false where the user has seen every item: then the item is
        not a negative. Both are on the CPU.
    """
    items, keys_J = len(train.counts_N), train.on_host.keys_J
    first_M = torch.searchsorted(keys_J, users_M * items)
    seen_M = torch.searchsorted(keys_J, (users_M + 1) * items) - first_M
    unseen_M = train.n_items - seen_M
    share_M = torch.rand(len(users_M), dtype=torch.float64, generator=generator)
    rank_M = (share_M * unseen_M).long()
    # The j-th seen item has item_j - j unseen items before it. The seen items before the unseen
    # item of rank r are those with item_j - j <= r: the first `low` of them, found by bisection.
    low_M, high_M = torch.zeros_like(seen_M), seen_M
    while bool((low_M < high_M).any()):
        middle_M = (low_M + high_M) // 2
        at_M = (first_M + middle_M).clamp_max(len(keys_J) - 1)
        before_M = keys_J[at_M] - users_M * items - middle_M
        right_M = (low_M < high_M) & (before_M <= rank_M)
        high_M = torch.where(right_M | (low_M >= high_M), high_M, middle_M)
        low_M = torch.where(right_M, middle_M + 1, low_M)
    exists_M = unseen_M > 0
    return torch.where(exists_M, rank_M + low_M, 0), exists_M


def draw_others(taken_K: Tensor, n_items: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw distinct items evenly from those that are not taken, in random order.

    Draws of taken or repeated items are rejected, so the costs are proportional to the number of
    items that are taken or drawn. If these are most of the catalogue, the other items are permuted.

    Args:
        taken_K: (K,) int64, on the CPU, without repetition.
        n_items: N.
        count: Number of drawn items, at most N - K.
        generator: Generator on the CPU.

    Returns:
        (count,) int64, on the CPU.
    """
    if 2 * (len(taken_K) + count) > n_items:
        is_other_N = torch.ones(n_items, dtype=torch.bool)
        is_other_N[taken_K] = False
        others = is_other_N.nonzero()[:, 0]
        return others[torch.randperm(len(others), generator=generator)[:count]]
    drawn, taken = np.empty(0, np.int64), taken_K.numpy()
    while len(drawn) < count:
        # At most half of the draws are rejected on average.
        size = 2 * (count - len(drawn)) + 8
        new = torch.randint(n_items, (size,), generator=generator).numpy()
        new = new[~np.isin(new, taken, kind="sort")]
        pool = np.concatenate([drawn, new])
        drawn = pool[np.sort(np.unique(pool, return_index=True)[1])]  # the first of equal draws
    return torch.from_numpy(drawn[:count])


class ItemSampler:
    """Draw items with a probability proportional to a power of their training interactions.

    Args:
        power: The power, at least 0; 0: all items that are not hidden are equally likely.
    """

    def __init__(self, power: float) -> None:
        self.power = power
        self._train: TrainSet | None = None
        self._cumulated_N = torch.empty(0)
        self._total = 1.0

    def draw(self, train: TrainSet, count: int, generator: torch.Generator) -> Tensor:
        """Draw items with repetition: (count,) int64, on the CPU."""
        share_X = torch.rand(count, dtype=torch.float64, generator=generator)
        if self.power == 0:
            return (share_X * train.n_items).long()
        self._accumulate(train)
        drawn_X = torch.searchsorted(self._cumulated_N, share_X * self._total, right=True)
        return drawn_X.clamp_max(train.n_items - 1)

    def probability(self, train: TrainSet, item_K: Tensor) -> Tensor:
        """Return the probability that a draw is the item: (K,) float32."""
        if self.power == 0:
            return torch.full(item_K.shape, 1 / train.n_items, device=item_K.device)
        self._accumulate(train)
        return train.counts_N[item_K].float().pow(self.power) / self._total

    def _accumulate(self, train: TrainSet) -> None:
        """Accumulate the powers of the counts of the items, once for a training set."""
        if self._train is not train:
            powers_N = train.on_host.counts_N.double().pow(self.power)
            self._train, self._cumulated_N = train, powers_N.cumsum(0)
            self._total = float(self._cumulated_N[-1])
