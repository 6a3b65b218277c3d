"""The objectives of PMMRec (Li et al., arXiv:2312.09602), as plain functions.

Each item of a batch is one column, with the number of slots that contain it. It counts as that many
negatives, so the softmax equals the softmax over slots of the equations. The negatives of a
position are "all the items in the batch except the interacted items of the current user".

In several processes, the columns are those of all processes, and every mean is the process's share
of the mean over all rows, see :mod:`trainer.distributed`.

Legend: B sequences, L slots, K distinct items of the batch, C those of all processes' batches,
M positions that have a next item, U users, J items of a user, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from trainer.data.device_copy import to_device
from trainer.distributed import gather_ids, gather_rows, rank_offset, scale_to_global_mean
from trainer.losses.in_batch import Columns, ExcludedLabels, in_batch

ALIGNMENTS = ("vcl", "icl", "ncl", "nicl")
UNCHANGED, SHUFFLED, REPLACED = range(3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Positions:
    """The positions of a batch that predict their next item, and the columns of the softmax."""

    item_C: Tensor
    """(C,) int64, the ids of the items."""
    count_C: Tensor
    """(C,) the number of slots that contain each item."""
    anchor_M: Tensor
    """(M,) int64 in [0, C), the item at each position."""
    next_M: Tensor
    """(M,) int64 in [0, C), the item after it."""
    own_UJ: Tensor
    """(U, J) int64, ids of the items of each user that are no negatives, padded with -1."""
    owner_M: Tensor
    """(M,) int64 in [0, U), on the CPU, the user of each position."""
    has_modality: Sequence[Tensor] | None = None
    """For each modality (M,) bool, on the CPU, true where the item at a position has it; ``None``:
    it is read from the modalities."""


def dap(
    query_MD: Tensor,
    item_CD: Tensor,
    at: Positions,
    *,
    scale: float = 1.0,
    log_popularity_C: Tensor | None = None,
) -> Tensor:
    """Return the loss of dense auto-regressive prediction, Eq. 5, among the items of the batch.

    Args:
        query_MD: (M, D) states of the user encoder.
        item_CD: (C, D) item vectors.
        at: The positions.
        scale: Factor on inner products; the equation has none.
        log_popularity_C: (C,) subtracted from scores, because popular items are drawn more often.
            Part of the released code, not of the equation.
    """
    loss = in_batch(
        query_MD,
        item_CD,
        at.next_M,
        scale=scale,
        columns=Columns(label_C=at.item_C, correction_C=log_popularity_C, count_C=at.count_C),
        excluded=ExcludedLabels(own_UJ=at.own_UJ, owner_M=at.owner_M),
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
    """Return the contrastive loss of the modalities of the same and of the next item, Eq. 6 to 9.

    For the anchor t_l, with d(a, b) = exp(scale cos(a, b)), each kind has these positives and
    negatives:

    ========  ===========================================  =====================================
    ``vcl``   d(t_l, v_l)                                  negatives in v
    ``icl``   d(t_l, v_l)                                  negatives in v and t
    ``ncl``   d(t_l, v_l) + d(t_l, v_l+1) + d(t_l, t_l+1)  negatives in v
    ``nicl``  d(t_l, v_l) + d(t_l, v_l+1) + d(t_l, t_l+1)  negatives in v and t
    ========  ===========================================  =====================================

    The loss is the mean over the anchors t_l and v_l (over all ordered pairs of more than two
    modalities). A position whose item lacks a modality of a pair is not an anchor of that pair.
    (According to the text of the paper, the NCL of Table VIII lacks the positives of the next item.
    That loss is ``icl``.)

    Args:
        kind: One of ``ALIGNMENTS``.
        modalities: For each modality, (C, D) vectors of the items, and (C,) bool, true where an
            item has the modality.
        at: The positions that are anchors.
        scale: 1 / temperature; the equations have 1.
        literal: Use the denominator of Eq. 8 as printed, without the positives of the next item.
            The loss can then be negative. Otherwise the denominator contains all positives.

    Returns:
        A scalar; zero where no item has two modalities.
    """
    assert kind in ALIGNMENTS
    sides = [
        _Side(
            unit_CD=functional.normalize(x_CD, dim=-1),
            present_C=present_C,
            has_M=(
                present_C[at.anchor_M].cpu() if at.has_modality is None else at.has_modality[number]
            ),
        )
        for number, (x_CD, present_C) in enumerate(modalities)
    ]
    losses = [
        _align_pair(kind, sides[a], sides[b], at, scale=scale, literal=literal)
        for a in range(len(sides))
        for b in range(len(sides))
        if a != b
    ]
    return torch.stack(losses).mean()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Side:
    """One modality of the batch's items."""

    unit_CD: Tensor
    """Vectors of length 1."""
    present_C: Tensor
    """(C,) bool, which items have the modality."""
    has_M: Tensor
    """(M,) bool, on the CPU, true where the item at a position has the modality."""


def _align_pair(
    kind: str, a: _Side, b: _Side, at: Positions, *, scale: float, literal: bool
) -> Tensor:
    """Return the loss of the anchors in modality a against modality b, see :func:`align`."""
    with_a, with_next = kind in ("icl", "nicl"), kind in ("ncl", "nicl")
    host_chosen_M = (a.has_M & b.has_M).nonzero()[:, 0]
    chosen_M = to_device(host_chosen_M, at.anchor_M.device)
    anchor_M, next_M = at.anchor_M[chosen_M], at.next_M[chosen_M]
    positives, keys, counts = [anchor_M], [b.unit_CD], [at.count_C * b.present_C]
    if with_next:
        positives.append(torch.where(b.present_C[next_M], next_M, -1))
        positives.append(torch.where(a.present_C[next_M], len(at.item_C) + next_M, -1))
    if with_a or with_next:
        keys.append(a.unit_CD)
        counts.append(at.count_C * a.present_C * with_a)
    loss = in_batch(
        functional.embedding(anchor_M, a.unit_CD),
        torch.cat(keys),
        torch.stack(positives, dim=1),
        scale=scale,
        columns=Columns(label_C=at.item_C.repeat(len(keys)), count_C=torch.cat(counts)),
        excluded=ExcludedLabels(own_UJ=at.own_UJ, owner_M=at.owner_M[host_chosen_M]),
        counted=1 if literal else None,
    )
    return scale_to_global_mean(loss, anchor_M)


def corrupt(
    item_BL: Tensor,
    lengths_B: Tensor,
    generator: torch.Generator,
    *,
    shuffle: float = 0.15,
    replace: float = 0.05,
) -> tuple[Tensor, Tensor]:
    """Corrupt sequences: some items change places, and others are replaced by items of the batch.

    The shuffled items of a sequence rotate in a random order, so that each item moves. The
    number of shuffled or replaced items is rounded up or down at random, so that its expectation is
    exact. A single item cannot be shuffled: instead of one item, two or none are shuffled. A slot
    that receives the same item again is unchanged.

    Args:
        item_BL: (B, L) int64, on the CPU.
        lengths_B: (B,) int64, on the CPU, at least 1.
        generator: On the CPU.
        shuffle: Share of the items of a sequence that change places.
        replace: Share of the items that are replaced by the item of a random slot of the batch.

    Returns:
        (B, L) the corrupted items and (B, L) ``UNCHANGED``, ``SHUFFLED`` or ``REPLACED``, both on
        the CPU.
    """
    B, L = item_BL.shape
    column_L = torch.arange(L)
    valid_BL = column_L < lengths_B[:, None]
    noise_BL, chance_B3, any_BL = (
        torch.rand(shape, generator=generator) for shape in ((B, L), (B, 3), (B, L))
    )
    moved_B = (shuffle * lengths_B + chance_B3[:, 0]).floor().long()
    moved_B = torch.where(moved_B == 1, 2 * (chance_B3[:, 1] < 0.5).long(), moved_B)
    moved_B = torch.where(lengths_B == 1, 0, moved_B.minimum(lengths_B))
    new_B = (replace * lengths_B + chance_B3[:, 2]).floor().long()
    # A random order of the slots of each sequence: the first ones move, the next are replaced.
    order_BL = noise_BL.masked_fill(~valid_BL, 2.0).argsort(dim=1, stable=True)
    moves_BL = column_L < moved_B[:, None]
    replaced_BL = ~moves_BL & (column_L < (moved_B + new_B).minimum(lengths_B)[:, None])
    after_BL = torch.where(column_L + 1 == moved_B[:, None], 0, column_L + 1).clamp_max(L - 1)
    source_BL = torch.where(moves_BL, order_BL.gather(1, after_BL), order_BL)
    flat = item_BL[valid_BL]
    drawn_BL = flat[(any_BL * len(flat)).long().clamp_max(len(flat) - 1)]
    value_BL = torch.where(replaced_BL, drawn_BL, item_BL.gather(1, source_BL))
    changed_BL = torch.empty_like(item_BL).scatter_(1, order_BL, value_BL)
    label_BL = torch.empty_like(item_BL).scatter_(1, order_BL, 1 + replaced_BL.long())
    return changed_BL, torch.where(changed_BL == item_BL, UNCHANGED, label_BL)


def nid(logits_M3: Tensor, label_M: Tensor, *, relu: bool = False) -> Tensor:
    """Return the noised item detection loss, Eq. 10: classify the items of corrupted sequences.

    The equation takes the log of rectified logits without a softmax, which is -inf where a logit is
    clipped. With a softmax it is this cross-entropy.

    Args:
        logits_M3: (M, 3) logits of each slot of the corrupted sequences.
        label_M: (M,) int64, ``UNCHANGED``, ``SHUFFLED`` or ``REPLACED``.
        relu: Clip the logits at 0 before the softmax: the nearest trainable form of the equation.
    """
    loss = functional.cross_entropy(logits_M3.relu() if relu else logits_M3, label_M)
    return scale_to_global_mean(loss, logits_M3)


def rcl(clean_BD: Tensor, noisy_BD: Tensor, user_B: Tensor, *, scale: float) -> Tensor:
    """Return the robustness-aware contrastive loss, Eq. 11, of sequences and corrupted sequences.

    Args:
        clean_BD: (B, D) pooled states of the sequences.
        noisy_BD: (B, D) pooled states of the corrupted sequences.
        user_B: (B,) int64, at least 0: sequences of the same user are not negatives of each other.
        scale: Factor on inner products; the equation has 1.
    """
    begin = rank_offset(len(user_B))
    loss = in_batch(
        clean_BD,
        gather_rows(noisy_BD),
        torch.arange(begin, begin + len(user_B), device=user_B.device),
        scale=scale,
        columns=Columns(label_C=gather_ids(user_B)),
    )
    return scale_to_global_mean(loss, user_B)


def pool(state_BLD: Tensor, lengths_B: Tensor, how: str) -> Tensor:
    """Return one vector for each sequence (B, D); Eq. 11 does not define it.

    Args:
        state_BLD: States; those of padding are finite and have weight 0.
        lengths_B: (B,) at least 1.
        how: ``mean`` over the slots of a sequence, or the state of its ``last`` slot.
    """
    column_L = torch.arange(state_BLD.shape[1], device=state_BLD.device)
    if how == "last":
        weight_BL = column_L == lengths_B[:, None] - 1
    else:
        weight_BL = (column_L < lengths_B[:, None]) / lengths_B[:, None]
    return (state_BLD * weight_BL[..., None]).sum(1)


def total(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the objectives, and their sum under the name ``loss`` (Eq. 12)."""
    return {"loss": torch.stack(list(losses.values())).sum(), **losses}
