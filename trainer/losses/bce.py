"""Binary cross-entropy with one sampled negative for each position."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from trainer.data.batches import Batch
from trainer.data.negative_sampling import sample_unseen
from trainer.distributed import global_mean_rows
from trainer.losses.base import DrawnItems, ItemVectors, Loss, Targets


def sampled_bce(
    query_MD: Tensor,
    positive_MD: Tensor,
    negative_MD: Tensor,
    exists_M: Tensor,
    scale: float = 1.0,
    *,
    count: int | None = None,
) -> Tensor:
    """Return the binary cross-entropy of one positive and one negative per row (Eq. 6 of MMSR).

    mean_m -log sigma(s q_m . p_m)  +  mean_m -log(1 - sigma(s q_m . n_m)), the second over the rows
    that have a negative. With several processes it is the share of this process in the means over
    all rows, see :mod:`trainer.distributed`.

    Args:
        query_MD: (M, D) queries.
        positive_MD: (M, D) vectors of the targets.
        negative_MD: (M, D) vectors of the negatives.
        exists_M: (M,) bool, true for rows that have a negative.
        scale: s, which is 1 / temperature.
        count: Number of rows that have a negative; ``None``: it is read from ``exists_M``.
    """
    positive_M = scale * (query_MD * positive_MD).sum(-1).float()
    negative_M = scale * (query_MD * negative_MD).sum(-1).float()
    return logits_bce(positive_M, negative_M, exists_M, count)


def logits_bce(
    positive_M: Tensor, negative_M: Tensor, exists_M: Tensor, count: int | None = None
) -> Tensor:
    """Return the loss of :func:`sampled_bce` from the logits of positives and negatives.

    Args:
        positive_M: (M,) float32 logits of the targets.
        negative_M: (M,) float32 logits of the negatives.
        exists_M: (M,) bool, true for rows that have a negative.
        count: Number of rows that have a negative; ``None``: it is read from ``exists_M``.
    """
    count = int(exists_M.sum()) if count is None else count
    positive_loss = functional.softplus(-positive_M).sum() / (
        global_mean_rows(len(positive_M)) or 1.0
    )
    negative_loss_M = torch.where(exists_M, functional.softplus(negative_M), 0)
    return positive_loss + negative_loss_M.sum() / (global_mean_rows(count) or 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledNegatives(DrawnItems):
    """One negative for each predicted position."""

    exists_X: Tensor
    """(X,) bool, false if the user has seen every item and has no negative."""

    @property
    def count(self) -> int:
        """Number of negatives that exist."""
        return int(self.on_host.exists_X.sum())


class SampledBCE(Loss):
    """``loss=bce``: binary cross-entropy with one unseen item for each target (MMSR, Eq. 6)."""

    reads = frozenset[str]()

    def draw(self, targets: Targets, batch: Batch) -> SampledNegatives:
        """Draw one item for each target, uniformly over those that its user has not seen."""
        users_M = batch.users_on_host[targets.on_host.row_M]
        items_M, exists_M = sample_unseen(batch.train, users_M, batch.generator)
        return SampledNegatives(items_X=items_M, exists_X=exists_M).to(batch.device)

    def forward(
        self,
        query_MD: Tensor,
        items: ItemVectors,
        targets: Targets,
        batch: Batch,
        drawn: DrawnItems | None,
    ) -> Tensor:
        """Return the loss; see :func:`sampled_bce`."""
        assert isinstance(drawn, SampledNegatives)
        positive_MD, negative_MD = items.gather(targets.item_M), items.gather(drawn.items_X)
        return sampled_bce(
            query_MD,
            positive_MD,
            negative_MD,
            drawn.exists_X,
            self.settings.scale,
            count=drawn.count,
        )
