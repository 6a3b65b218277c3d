"""The in-batch losses written as their formulas say, in float64 and with Python loops."""

import torch
from torch import Tensor


def in_batch(
    query_MD: Tensor,
    key_CD: Tensor,
    positives: list[list[int]],
    *,
    scale: float = 1.0,
    labels: list[int] | None = None,
    own: list[set[int]] | None = None,
    correction: list[float] | None = None,
    counts: list[float] | None = None,
    counted: int | None = None,
) -> Tensor:
    """-1/M sum_m log( sum_P e^s / (sum_P[:counted] e^s + sum_N count e^s) ), column by column."""
    total = torch.zeros((), dtype=torch.float64)
    for m, row in enumerate(positives):
        score_C = scale * key_CD @ query_MD[m]
        if correction:
            score_C = score_C - torch.tensor(correction, dtype=torch.float64)
        mine = set() if labels is None else {labels[p] for p in row} if own is None else own[m]
        negatives = [
            c
            for c in range(len(key_CD))
            if c not in row and not (labels is not None and labels[c] in mine)
        ]
        times = torch.tensor([counts[c] if counts else 1 for c in negatives], dtype=torch.float64)
        above = score_C[row]
        below = torch.cat([above[:counted], score_C[negatives] + times.log()])
        total = total - above.logsumexp(0) + below.logsumexp(0)
    return total / max(1, len(positives))
