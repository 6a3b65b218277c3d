"""Confidence intervals and significance tests over users.

Both procedures treat the users as the sample. They do not measure the variation over training
seeds: for that, train several.

scipy.stats has the same procedures. Its percentile bootstrap gives the same intervals in 5 times
the CPU time, and its permutation test draws a sign for each user and resample as a float: 200
seconds were not enough for 22,363 users, where this file's test takes 0.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

_DRAWN_AT_ONCE = 2**18  # bytes of random signs in memory; each needs 16 bytes of work space


def bootstrap(
    values: Values, *, samples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> tuple[Values, Values]:
    """Return the percentile bootstrap interval of the mean over users (Efron 1979).

    Each resample draws U users with replacement and is shared by all metrics. Memory is a few
    arrays of length U and the (samples, M) means.

    Args:
        values: (U, M) per-user values of M metrics.
        samples: Resamples.
        confidence: Share of the resampled means inside the interval, 0..1 exclusive.
        seed: Seed of the resamples; the same seed draws the same users.

    Returns:
        low (M,) and high (M,).

    Raises:
        ValueError: Values that are not a finite (U, M) matrix with users, or senseless settings.
    """
    if values.ndim != 2 or not len(values):
        raise ValueError(f"values have shape {values.shape}: expected (users, metrics), users >= 1")
    _check(values, samples, confidence)
    users = len(values)
    # Relative to one user, values that do not vary have a mean without rounding.
    origin = values[0].astype(np.float64)
    centred = values - origin
    rng = np.random.default_rng(seed)
    means = np.empty((samples, values.shape[1]))
    for sample in range(samples):
        drawn = rng.integers(0, users, size=users, dtype=np.int32)
        means[sample] = np.bincount(drawn, minlength=users) @ centred
    tail = (1 - confidence) / 2
    low, high = np.quantile(means / users, [tail, 1 - tail], axis=0)
    return origin + low, origin + high


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedTest:
    """Outcome of comparing two systems on the same users."""

    difference: float
    """Mean of a - b over users."""
    low: float
    """Lower end of the bootstrap interval of the difference."""
    high: float
    """Upper end."""
    p_value: float
    """Two-sided: chance of a mean at least as far from zero if a and b were interchangeable."""


def paired_test(
    a: Values,
    b: Values,
    *,
    samples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedTest:
    """Test mean(a) = mean(b) by a two-sided paired randomisation test.

    Under the null hypothesis each user's pair could as well be swapped, so the sign of each
    difference is a coin toss (Fisher 1935; Smucker, Allan and Carterette, CIKM 2007). With n users
    that differ and 2^n <= samples, every assignment of signs is counted and the p-value is exact;
    otherwise it is (1 + hits) / (1 + samples) over random ones, which is never zero (Phipson and
    Smyth 2010). The interval is `bootstrap`'s, of the differences with 1,000 resamples: another
    procedure, so at the very edge it can disagree with the p-value.

    Args:
        a: (U,) per-user values of one system.
        b: (U,) those of the other, same users in the same order.
        samples: Sign assignments.
        confidence: Confidence of the interval, 0..1 exclusive.
        seed: Seed of the signs and of the resamples.

    Raises:
        ValueError: Arrays that are not finite, of one length and with users, or senseless settings.
    """
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(f"a has shape {a.shape} and b {b.shape}: expected the same users, >= 1")
    difference = a.astype(np.float64) - b.astype(np.float64)
    _check(difference, samples, confidence)
    low, high = bootstrap(difference[:, None], confidence=confidence, seed=seed)
    return PairedTest(
        difference=float(difference.mean()),
        low=float(low[0]),
        high=float(high[0]),
        p_value=_sign_flip(difference[difference != 0], samples, seed),
    )


def _sign_flip(difference: Values, samples: int, seed: int) -> float:
    """Return the two-sided p-value of the sum under random signs, of nonzero differences."""
    count, groups = len(difference), -(-len(difference) // 8)
    exact = count < 63 and 2**count <= samples
    total = 2**count if exact else samples
    # A byte holds the signs of eight users; `taken` holds what each byte subtracts from the sum.
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    padded = np.zeros((groups, 8))
    padded.flat[:count] = difference
    taken = (2 * padded @ bits.T).ravel()
    # Sums that are equal in exact arithmetic must count as equal, in any order of addition.
    reach = abs(difference.sum()) - 1e-12 * np.abs(difference).sum()
    rng = np.random.default_rng(seed)
    step = max(1, _DRAWN_AT_ONCE // max(1, groups))
    hits = 0
    for start in range(0, total, step):
        rows = min(step, total - start)
        if exact:
            every = np.arange(start, start + rows, dtype="<u8")[:, None].view(np.uint8)
            signs = every[:, :groups]
        else:
            signs = rng.integers(0, 256, size=(rows, groups), dtype=np.uint8)
        sums = difference.sum() - taken[signs + 256 * np.arange(groups)].sum(axis=1)
        hits += int((np.abs(sums) >= reach).sum())
    return hits / total if exact else (1 + hits) / (1 + total)


def _check(values: Values, samples: int, confidence: float) -> None:
    if not np.isfinite(values).all():
        raise ValueError("values hold NaN or infinity")
    if samples < 1:
        raise ValueError(f"samples is {samples}: it must be at least 1")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: it must lie between 0 and 1")
