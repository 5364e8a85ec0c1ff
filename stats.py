"""The statistics of the retrieval report (stage 4) and of the arena's results page (stage 5); numpy and scipy only.

Short pure functions; each docstring gives the definition, what it assumes and where it comes from. Randomness comes
from a seed, so the same votes give the same page. scipy is imported where it is used, for a quick start.
Readers go top to bottom: intervals and corrections -> paired bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ALPHA = 0.05  # two-sided level of every test; intervals are 95%
BLOCK = 4_000_000  # numbers drawn at once by a bootstrap: 32 MB an array

# --------------------------------------------------------------------------------------------------------------------
# Intervals and corrections


def wilson(wins: float, n: float, alpha: float = ALPHA) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927, without continuity correction).

    Assumes n independent votes of one probability; `wins` may hold halves. No votes give (0, 1): nothing is known.
    """
    from scipy.special import ndtri

    _check_counts(wins, n)
    if n == 0:
        return 0.0, 1.0
    z2 = ndtri(1 - alpha / 2) ** 2
    center = (wins + z2 / 2) / (n + z2)
    half = math.sqrt(z2 * (wins * (n - wins) / n + z2 / 4)) / (n + z2)
    # At 0 and n the bound is exact; rounding must not leave it at 1e-17.
    return (0.0 if wins == 0 else center - half), (1.0 if wins == n else center + half)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values in the order given (Holm 1979); valid under any dependence.

    Hypothesis i is rejected at level alpha, with family-wise error at most alpha, when its adjusted value is <= alpha.
    """
    values = np.asarray(p, dtype=float)
    if values.size and not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"p-values must lie in [0, 1], got {list(p)}")
    order = np.argsort(values, kind="stable")
    adjusted = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    result = np.empty_like(values)
    result[order] = np.minimum(adjusted, 1.0)
    return result.tolist()


def _check_counts(wins: float, n: float) -> None:
    if not (0 <= wins <= n):
        raise ValueError(f"need 0 <= wins <= n, got wins={wins}, n={n}")


# --------------------------------------------------------------------------------------------------------------------
# Paired bootstrap


class Difference(NamedTuple):
    """mean(b - a) with its 95% interval and the two-sided p-value of "no difference".

    p <= 0.05 exactly when the interval leaves out 0. Where too few groups leave it unknown, low and high are None.
    """

    mean: float
    low: float | None
    high: float | None
    p: float


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], draws: int = 10_000, seed: int = 0, groups: Sequence | None = None
) -> Difference:
    """Symmetric studentised bootstrap of mean(b - a), where a[i] and b[i] are one query's score under two models.

    Args:
        a, b: float [N], finite.
        groups: [N] labels; queries of one label (a duplicate group) are drawn together, so only groups need be
            independent of each other. None: every query is its own group.
    The interval is mean -+ q * s: s is the standard error over groups, and q the 95% quantile of |mean* - mean| / s*
    over resamples (Hall 1988, "On symmetric bootstrap confidence intervals": coverage error of order N^-2, where the
    percentile interval has N^-1). Recall differs on few queries, and a resample that holds none of those has s* = 0;
    so the spread of one more group is added to every variance, s and s* alike, which keeps all of them finite.
    p is the share of resamples at least as far out, counted with the one observed: never below 1 / (draws + 1).
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(f"need two equally long lists of scores, got shapes {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("scores must be finite")
    if draws < 100:
        raise ValueError(f"draws must be at least 100, got {draws}")
    sums, sizes = _group_totals(b - a, groups)
    count, mean = len(sums), float(sums.sum() / sizes.sum())
    residuals = sums - mean * sizes
    if count < 2:
        return Difference(mean, None, None, 1.0)
    if abs(residuals).max() <= 1e-12 * abs(sums).max():  # no spread to draw from: the sign test is what is left
        p = 2.0 ** max(1 - count, -1000) if mean else 1.0
        return Difference(mean, mean, mean, p) if p <= ALPHA or not mean else Difference(mean, None, None, p)
    more = (residuals**2).mean() / sizes.sum() ** 2
    error = math.sqrt(_variance(residuals, sizes) + more)
    far = np.sort(_studentised(residuals, sizes, more, draws, np.random.default_rng(seed)))
    half = error * float(far[-math.floor(ALPHA * (draws + 1))])
    p = (1 + int((far >= abs(mean) / error * (1 - 1e-12)).sum())) / (draws + 1)
    if p > ALPHA:  # rounding must not let the two disagree
        half = max(half, abs(mean))
    return Difference(mean, mean - half, mean + half, p)


def _group_totals(values: np.ndarray, groups: Sequence | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and size of each group: float [G], float [G]."""
    if groups is None:
        return values, np.ones(len(values))
    if len(groups) != len(values):
        raise ValueError(f"need one group a score, got {len(groups)} groups and {len(values)} scores")
    index: dict = {}
    codes = np.array([index.setdefault(group, len(index)) for group in groups])
    return np.bincount(codes, weights=values), np.bincount(codes).astype(float)


def _variance(residuals: np.ndarray, sizes: np.ndarray) -> float:
    """Squared standard error of a mean over groups, a ratio of sums when their sizes differ (Cochran 1977, 6.4)."""
    return float(len(sizes) / (len(sizes) - 1) * (residuals**2).sum() / sizes.sum() ** 2)


def _studentised(
    residuals: np.ndarray, sizes: np.ndarray, more: float, draws: int, rng: np.random.Generator
) -> np.ndarray:
    """|mean* - mean| / s* of `draws` resamples of whole groups, float [draws]; at most BLOCK numbers are held at once.

    Groups of equal residual and size are interchangeable: with few kinds (recall is 0 or 1) their multinomial counts
    are drawn instead of the groups, which has the same distribution and costs a hundredth.
    """
    count = len(sizes)
    kinds, repeats = np.unique(np.stack([residuals, sizes], axis=1), axis=0, return_counts=True)  # [K, 2], [K]
    few = len(kinds) * 10 <= count
    if not few:
        kinds = np.stack([residuals, sizes], axis=1)
    e, n = kinds.T
    terms = np.stack([e, n, e * e, e * n, n * n], axis=1)  # [K, 5]
    far = np.empty(draws)
    step = max(1, BLOCK // (5 * len(kinds)))
    for start in range(0, draws, step):
        rows = min(step, draws - start)
        if few:
            totals = rng.multinomial(count, repeats / count, size=rows) @ terms  # [rows, 5]
        else:
            totals = terms[rng.integers(0, count, size=(rows, count), dtype=np.int32)].sum(axis=1)
        shift = totals[:, 0] / totals[:, 1]  # mean* - mean
        square = totals[:, 2] - 2 * shift * totals[:, 3] + shift**2 * totals[:, 4]
        variance = count / (count - 1) * np.maximum(square, 0) / totals[:, 1] ** 2
        far[start : start + rows] = abs(shift) / np.sqrt(variance + more)
    return far
