"""The objectives of PMMRec (Li et al., arXiv:2312.09602), as plain functions.

Items of a batch are held once, with the number of slots in which each stands: as a negative an item
counts that often, as in a softmax over slots, which the equations write. What is no negative of
a position is what its user has interacted with (the paper: "all the items in the batch except the
interacted items of the current user").

Where several processes train together, columns are those of all of them, and every mean is the
share of the mean over all rows, see :mod:`trainer.distributed`.

Legend: B sequences, L slots, K distinct items of the batch, C those of all processes' batches,
M positions that have a next item, U users, J items of a user, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from trainer.distributed import gather_ids, gather_rows, rank_offset, scale_to_global_mean
from trainer.losses.in_batch import in_batch

ALIGNMENTS = ("vcl", "icl", "ncl", "nicl")
UNCHANGED, SHUFFLED, REPLACED = range(3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Positions:
    """The positions of a batch that predict, and what may be a negative of each."""

    item_C: Tensor
    """(C,) int64, the ids of the items."""
    count_C: Tensor
    """(C,) in how many slots each stands."""
    anchor_M: Tensor
    """(M,) int64 in [0, C), the item at each position."""
    next_M: Tensor
    """(M,) int64 in [0, C), the item after it."""
    own_UJ: Tensor
    """(U, J) int64, ids of the items of each user, padded with -1."""
    owner_M: Tensor
    """(M,) int64 in [0, U), whose position it is."""


def dap(
    query_MD: Tensor,
    item_CD: Tensor,
    at: Positions,
    *,
    scale: float = 1.0,
    log_popularity_C: Tensor | None = None,
) -> Tensor:
    """Dense auto-regressive prediction, Eq. 5: the next item of each position among the batch's.

    Args:
        query_MD: (M, D) states of the user encoder.
        item_CD: (C, D) item vectors.
        at: Which positions these are.
        scale: Factor on inner products; the equation has none.
        log_popularity_C: (C,) subtracted from scores, because popular items are drawn oftener: in
            the released code, not in the equation.
    """
    loss = in_batch(
        query_MD,
        item_CD,
        at.next_M,
        scale=scale,
        label_C=at.item_C,
        own_UJ=at.own_UJ,
        owner_M=at.owner_M,
        correction_C=log_popularity_C,
        count_C=at.count_C,
    )
    return scale_to_global_mean(loss, query_MD)


def align(
    kind: str,
    modalities: Sequence[tuple[Tensor, Tensor]],
    at: Positions,
    *,
    scale: float,
    literal: bool = False,
) -> Tensor:
    """Contrast modalities of the same and of the next item, Eq. 6 to 9.

    For the anchor t_l, with d(a, b) = exp(scale cos(a, b)), positives over positives and negatives:

    ========  ===========================================  =====================================
    ``vcl``   d(t_l, v_l)                                  negatives in v
    ``icl``   d(t_l, v_l)                                  negatives in v and t
    ``ncl``   d(t_l, v_l) + d(t_l, v_l+1) + d(t_l, t_l+1)  negatives in v
    ``nicl``  d(t_l, v_l) + d(t_l, v_l+1) + d(t_l, t_l+1)  negatives in v and t
    ========  ===========================================  =====================================

    and likewise for v_l; the mean over both (over all ordered pairs, of more than two modalities).
    A position whose item lacks one of a pair of modalities is no anchor for that pair. (What
    Table VIII calls NCL lacks, by its text, the next item's positives: that is ``icl``.)

    Args:
        kind: One of ``ALIGNMENTS``.
        modalities: For each, (C, D) vectors of the batch's items, and (C,) bool which have it.
        at: The positions that are anchors.
        scale: 1 / temperature; the equations have 1.
        literal: The denominator of Eq. 8 to the letter, which lacks the positives of the next
            item: the loss can become negative. Otherwise all positives stand in it.

    Returns:
        A scalar; zero where no item has two modalities.
    """
    assert kind in ALIGNMENTS
    intra, following = kind in ("icl", "nicl"), kind in ("ncl", "nicl")
    units = [functional.normalize(x_CD, dim=-1) for x_CD, _ in modalities]
    held = [there_C for _, there_C in modalities]
    C, losses = len(at.item_C), []
    for a, b in ((a, b) for a in range(len(units)) for b in range(len(units)) if a != b):
        chosen_M = (held[a] & held[b])[at.anchor_M]
        anchor_M, next_M = at.anchor_M[chosen_M], at.next_M[chosen_M]
        positives, keys, counts = [anchor_M], [units[b]], [at.count_C * held[b]]
        if following:
            positives.append(torch.where(held[b][next_M], next_M, -1))
            positives.append(torch.where(held[a][next_M], C + next_M, -1))
        if intra or following:
            keys.append(units[a])
            counts.append(at.count_C * held[a] * intra)
        loss = in_batch(
            functional.embedding(anchor_M, units[a]),
            torch.cat(keys),
            torch.stack(positives, dim=1),
            scale=scale,
            label_C=at.item_C.repeat(len(keys)),
            own_UJ=at.own_UJ,
            owner_M=at.owner_M[chosen_M],
            count_C=torch.cat(counts),
            counted=1 if literal else None,
        )
        losses.append(scale_to_global_mean(loss, anchor_M))
    return torch.stack(losses).mean()


def corrupt(
    item_BL: Tensor,
    lengths_B: Tensor,
    generator: torch.Generator,
    *,
    shuffle: float = 0.15,
    replace: float = 0.05,
) -> tuple[Tensor, Tensor]:
    """Disturb sequences: some items change places, others become random items of the batch.

    The shuffled items of a sequence rotate in a random order, so that each leaves its place. Shares
    of a length that are no whole number are rounded up or down at random, in the mean to nothing;
    a single item cannot be shuffled, so one is two or none. What a slot holds is what counts: where
    the same item comes to stand again, the slot is unchanged.

    Args:
        item_BL: (B, L) int64.
        lengths_B: (B,) int64, at least 1.
        generator: On the CPU.
        shuffle: Share of a sequence's items that change places.
        replace: Share of the others that are replaced; a random slot of the batch gives the item.

    Returns:
        (B, L) the disturbed items and (B, L) ``UNCHANGED``, ``SHUFFLED`` or ``REPLACED``.
    """
    B, L = item_BL.shape
    device = item_BL.device
    column_L = torch.arange(L, device=device)
    valid_BL = column_L < lengths_B[:, None]
    noise_BL, chance_B3, any_BL = (
        torch.rand(shape, generator=generator).to(device) for shape in ((B, L), (B, 3), (B, L))
    )
    moved_B = (shuffle * lengths_B + chance_B3[:, 0]).floor().long()
    moved_B = torch.where(moved_B == 1, 2 * (chance_B3[:, 1] < 0.5).long(), moved_B)
    moved_B = torch.where(lengths_B == 1, 0, moved_B.minimum(lengths_B))
    new_B = (replace * lengths_B + chance_B3[:, 2]).floor().long()
    # A random order of each sequence's slots: the first ones move, the ones behind are replaced.
    order_BL = noise_BL.masked_fill(~valid_BL, 2.0).argsort(dim=1, stable=True)
    moves_BL = column_L < moved_B[:, None]
    replaced_BL = ~moves_BL & (column_L < (moved_B + new_B).minimum(lengths_B)[:, None])
    after_BL = torch.where(column_L + 1 == moved_B[:, None], 0, column_L + 1).clamp_max(L - 1)
    source_BL = torch.where(moves_BL, order_BL.gather(1, after_BL), order_BL)
    flat = item_BL[valid_BL]
    drawn_BL = flat[(any_BL * len(flat)).long().clamp_max(len(flat) - 1)]
    found_BL = torch.where(replaced_BL, drawn_BL, item_BL.gather(1, source_BL))
    changed_BL = torch.empty_like(item_BL).scatter_(1, order_BL, found_BL)
    fate_BL = torch.empty_like(item_BL).scatter_(1, order_BL, 1 + replaced_BL.long())
    return changed_BL, torch.where(changed_BL == item_BL, UNCHANGED, fate_BL)


def nid(logits_M3: Tensor, fate_M: Tensor, *, relu: bool = False) -> Tensor:
    """Noised item detection, Eq. 10: is an item unchanged, shuffled or replaced?

    The equation takes the log of ReLU'd logits, which is -inf where one is clipped, and has no
    softmax; with one it is this cross-entropy.

    Args:
        logits_M3: (M, 3) of each slot of the disturbed sequences.
        fate_M: (M,) int64, what :func:`corrupt` did to it.
        relu: Clip the logits before the softmax: as near to the equation as can be trained.
    """
    loss = functional.cross_entropy(logits_M3.relu() if relu else logits_M3, fate_M)
    return scale_to_global_mean(loss, logits_M3)


def rcl(clean_BD: Tensor, noisy_BD: Tensor, user_B: Tensor, *, scale: float) -> Tensor:
    """Robustness-aware contrastive learning, Eq. 11: a sequence and its disturbed self.

    Args:
        clean_BD: (B, D) pooled states of the sequences.
        noisy_BD: (B, D) of the disturbed ones.
        user_B: (B,) int64, at least 0: sequences of the same user are no negatives of each other.
        scale: Factor on inner products; the equation has 1.
    """
    begin = rank_offset(len(user_B), user_B.device)
    loss = in_batch(
        clean_BD,
        gather_rows(noisy_BD),
        torch.arange(begin, begin + len(user_B), device=user_B.device),
        scale=scale,
        label_C=gather_ids(user_B),
    )
    return scale_to_global_mean(loss, user_B)


def pool(state_BLD: Tensor, lengths_B: Tensor, how: str) -> Tensor:
    """One vector of each sequence, which Eq. 11 leaves open: (B, D).

    Args:
        state_BLD: States; those beyond a sequence's end are finite and count for nothing.
        lengths_B: (B,) at least 1.
        how: ``mean`` over a sequence's slots, or the ``last`` one.
    """
    column_L = torch.arange(state_BLD.shape[1], device=state_BLD.device)
    if how == "last":
        weight_BL = column_L == lengths_B[:, None] - 1
    else:
        weight_BL = (column_L < lengths_B[:, None]) / lengths_B[:, None]
    return (state_BLD * weight_BL[..., None]).sum(1)


def total(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The plain sum of the objectives, Eq. 12, as ``loss`` beside each of them."""
    return {"loss": torch.stack(list(losses.values())).sum(), **losses}
