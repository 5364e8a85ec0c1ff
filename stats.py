"""The statistics of the retrieval report (stage 4) and of the arena's results page (stage 5); numpy and scipy only.

Short pure functions; each docstring gives the definition, what it assumes and where it comes from. Randomness comes
from a seed, so the same votes give the same page. scipy is imported where it is used, for a quick start.
Readers go top to bottom: intervals and corrections -> paired bootstrap -> tests for a planned end -> the test that
stays valid under looking -> position -> categories -> agreement -> votes needed -> ranking -> what the rows held ->
`arena_statistics`, which puts the whole results page together from the vote log.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

ALPHA = 0.05  # two-sided level of every test; intervals are 95%
BLOCK = 400_000  # numbers drawn at once: 3 MB an array stay in the cache, which is twice as fast as 32 MB
PRIOR = 10  # a of Beta(a, a): the mixture of the e-value, fixed before any vote; bets mostly on win rates of 0.35-0.65
PATIENCE = 20  # queries opened after a query before it closes without its missing judges
CATEGORY_VOTES = 20  # a category with fewer votes gets no test of its own
LOOKS = 200  # points of a confidence sequence on the page
CHOICES = {"A": "left", "B": "right", "T": "tie", "N": "abstain"}
OUTCOMES = {"wins": 1, "losses": -1, "ties": 0}

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
    z2 = float(ndtri(1 - alpha / 2)) ** 2
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
    step = max(1, BLOCK // (2 * len(kinds)))
    for start in range(0, draws, step):
        rows = min(step, draws - start)
        if few:
            times = rng.multinomial(count, repeats / count, size=rows)  # how often each kind was drawn: [rows, K]
        else:
            picks = rng.integers(0, count, size=(rows, count)) + count * np.arange(rows)[:, None]
            times = np.bincount(picks.ravel(), minlength=rows * count).reshape(rows, count)
        totals = times @ terms  # [rows, 5]
        shift = totals[:, 0] / totals[:, 1]  # mean* - mean
        square = totals[:, 2] - 2 * shift * totals[:, 3] + shift**2 * totals[:, 4]
        variance = count / (count - 1) * np.maximum(square, 0) / totals[:, 1] ** 2
        far[start : start + rows] = abs(shift) / np.sqrt(variance + more)
    return far


# --------------------------------------------------------------------------------------------------------------------
# Tests for a planned end


def binomial_test(wins: int, n: int) -> float:
    """Exact two-sided p-value of "each of n independent votes is a fair coin"; 1 without votes.

    Twice the smaller tail, which for a fair coin is also the sum over all outcomes no likelier than the one seen.
    Valid when n was planned: looked at after every vote, it raises a false alarm in about 36% of 500-vote studies.
    """
    from scipy.special import bdtr

    _check_counts(wins, n)
    return min(1.0, 2 * float(bdtr(min(wins, n - wins), n, 0.5))) if n else 1.0


def sign_flip_test(scores: Sequence[float], draws: int = 20_000, seed: int = 0) -> float:
    """Two-sided p-value of "every query's score is as likely s as -s", from the sum of the scores (Fisher 1935).

    Args:
        scores: float [Q] in [-1, 1], one a query, independent of each other; the judges within one need not be.
    Exact by convolution when the scores are multiples of one small fraction and not too many (which means of votes
    are up to thousands of queries), else Monte Carlo with the observed flip counted. On -1 and +1 it is the binomial.
    """
    scores = np.asarray(scores, dtype=float)
    sizes = abs(scores[scores != 0])
    if not len(sizes):
        return 1.0
    fractions = [Fraction(x).limit_denominator(100) for x in np.unique(sizes).tolist()]
    unit = math.lcm(*(fraction.denominator for fraction in fractions))
    steps = np.rint(sizes * unit).astype(np.int64)
    if abs(steps / unit - sizes).max() < 1e-9 and len(steps) * steps.sum() <= 50_000_000:
        total = abs(int(np.rint(scores * unit).sum()))
        return _exact_flips(steps, total)
    return _sampled_flips(sizes, abs(float(scores.sum())), draws, np.random.default_rng(seed))


def _exact_flips(steps: np.ndarray, total: int) -> float:
    """P(|sum of +-steps| >= total) under fair signs: the sum's whole distribution, one query convolved at a time."""
    reach = int(steps.sum())
    chance = np.zeros(2 * reach + 1)  # chance[reach + x] = P(sum = x)
    chance[reach] = 1.0
    for step in steps:
        moved = np.zeros_like(chance)
        moved[step:] += chance[:-step]
        moved[:-step] += chance[step:]
        chance = moved / 2
    return min(1.0, float(chance[: reach - total + 1].sum() + chance[reach + total :].sum())) if total else 1.0


def _sampled_flips(sizes: np.ndarray, total: float, draws: int, rng: np.random.Generator) -> float:
    kinds, repeats = np.unique(sizes, return_counts=True)
    if len(kinds) * 10 <= len(sizes):  # queries of one size are drawn together: the number of plus signs among them
        sums = (2 * rng.binomial(repeats, 0.5, size=(draws, len(kinds))) - repeats) @ kinds
    else:
        step = max(1, BLOCK // len(sizes))
        blocks = [min(step, draws - start) for start in range(0, draws, step)]
        sums = np.concatenate([(2.0 * rng.integers(0, 2, size=(rows, len(sizes))) - 1) @ sizes for rows in blocks])
    return (1 + int((abs(sums) >= total * (1 - 1e-12)).sum())) / (draws + 1)


# --------------------------------------------------------------------------------------------------------------------
# The test that stays valid when people look early


def log_e_value(wins: Any, losses: Any, prior: float = PRIOR, theta: Any = 0.5) -> Any:
    """Natural logarithm of the e-value against "each vote is won with probability theta"; arrays broadcast.

    E = integral of Beta(a, a)(q) (q / theta)^w ((1 - q) / (1 - theta))^l dq, which is 2^n B(a+w, a+l) / B(a, a) at
    theta = 1/2 (Robbins 1970, "Statistical methods related to the law of the iterated logarithm"). It is a
    martingale under the null, so by Ville's inequality P(E ever reaches 20) <= 1/20, whenever and however often
    people look. w of n = 100,000 is safe, for nothing leaves the logarithm.
    """
    from scipy.special import betaln, xlogy

    fair = xlogy(wins, theta) + xlogy(losses, 1 - np.asarray(theta, dtype=float))
    return betaln(prior + np.asarray(wins), prior + np.asarray(losses)) - betaln(prior, prior) - fair


def anytime_p(log_e: Sequence[float]) -> float:
    """p = min(1, 1 / max E) over the looks so far: at most alpha with probability at most alpha, at any time."""
    return float(math.exp(-max(0.0, *log_e))) if len(log_e) else 1.0


def confidence_set(wins: Any, losses: Any, prior: float = PRIOR, alpha: float = ALPHA) -> tuple[np.ndarray, np.ndarray]:
    """Win rates theta that the e-value has not rejected: E against theta < 1 / alpha. Arrays [T] give arrays [T].

    log E is convex in theta and at most 0 at w / n, so the set is an interval around w / n, found by bisection.
    """
    wins, losses = np.broadcast_arrays(np.asarray(wins, dtype=float), np.asarray(losses, dtype=float))
    center = np.where(wins + losses > 0, wins / np.maximum(wins + losses, 1), 0.5)
    return _level_set(lambda theta: log_e_value(wins, losses, prior, theta), center, alpha)


def confidence_sequence(wins: Any, losses: Any, prior: float = PRIOR, alpha: float = ALPHA) -> tuple:
    """The confidence sets after each vote, intersected over time: low [T], high [T] from cumulative counts [T].

    The true rate lies in all of them at once with probability 1 - alpha. low > high, an empty intersection, says that
    no one rate explains the whole course (or that the one case in twenty has come).
    """
    low, high = confidence_set(wins, losses, prior, alpha)
    return np.maximum.accumulate(low), np.minimum.accumulate(high)


def _level_set(log_e, center: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of {theta: log_e(theta) < log(1 / alpha)}, for log_e convex and below that level at `center`."""
    ends = []
    for far in (0.0, 1.0):
        inside, outside = center.astype(float), np.full_like(center, far, dtype=float)
        for _ in range(50):
            middle = (inside + outside) / 2
            safe = np.clip(middle, 1e-15, 1 - 1e-15)
            kept = log_e(safe) < -math.log(alpha)
            inside, outside = np.where(kept, middle, inside), np.where(kept, outside, middle)
        ends.append(outside)
    return ends[0], ends[1]


def _mixture(prior: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Win rates [M] and weights [M], summing to 1, that stand for Beta(prior, prior) after up to `count` scores.

    Evenly spaced in the angle arccos(1 - 2 theta), where a likelihood of n scores is about 1 / sqrt(n) wide anywhere;
    four points to that width make the midpoint rule exact to about 1e-14. Any weights make a valid e-process.
    """
    points = max(64, math.ceil(4 * math.sqrt(count + 2 * prior)))
    theta = (1 - np.cos(np.pi * (np.arange(points) + 0.5) / points)) / 2
    weights = (theta * (1 - theta)) ** (prior - 0.5)  # Beta density times the change of variable
    return theta, weights / weights.sum()


def query_log_e(scores: Any, prior: float = PRIOR) -> np.ndarray:
    """log E after each query, float [..., Q], from the queries' scores in [-1, 1], float [..., Q].

    The betting martingale prod(1 + lambda s_q), mixed over lambda = 2 theta - 1 with theta from Beta(a, a)
    (Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting"). It needs only that each
    score has mean 0 given the earlier ones, so judges of one query may agree as much as they like. Scores of -1, 0, +1
    give log_e_value(wins, losses): a tie multiplies by 1.
    """
    scores = np.asarray(scores, dtype=float)
    if scores.size and not (abs(scores) <= 1).all():
        raise ValueError("scores must lie in [-1, 1]")
    theta, weights = _mixture(prior, scores.shape[-1])
    kinds, codes = np.unique(scores, return_inverse=True)
    codes = codes.reshape(scores.shape)
    table = np.log1p(kinds[:, None] * (2 * theta - 1))  # [U, M]
    wealth = np.log(weights) + np.zeros((*scores.shape[:-1], 1, 1))  # log of weight times martingale: [..., 1, M]
    result = np.empty(scores.shape)
    step = max(1, BLOCK // (len(theta) * max(1, math.prod(scores.shape[:-1]))))
    for start in range(0, scores.shape[-1], step):
        path = wealth + np.cumsum(table[codes[..., start : start + step]], axis=-2)
        top = path.max(axis=-1)
        result[..., start : start + step] = top + np.log(np.exp(path - top[..., None]).sum(axis=-1))
        wealth = path[..., -1:, :]
    return result


def query_confidence_sequence(scores: Sequence[float], looks: Sequence[int], prior: float = PRIOR) -> tuple:
    """Confidence sequence of the mean score at the given looks (numbers of queries seen): low [T], high [T] in [-1, 1].

    The e-value against mean m bets, with x = (1 + s) / 2 and theta0 = (1 + m) / 2, by the factors
    x theta / theta0 + (1 - x) (1 - theta) / (1 - theta0): for wins and losses alone that is `log_e_value`'s. It is
    log-convex in theta0 and at most 1 at the sample mean, so each set is an interval; the looks are intersected.
    """
    scores = np.asarray(scores, dtype=float)
    if not len(scores):
        return np.full(len(looks), -1.0), np.full(len(looks), 1.0)
    theta, weights = _mixture(prior, len(scores))
    kinds, codes = np.unique((1 + scores) / 2, return_inverse=True)
    seen = np.zeros((len(looks), len(kinds)))  # how often each score had come at each look
    for code in range(len(kinds)):
        seen[:, code] = np.concatenate([[0], np.cumsum(codes == code)])[np.asarray(looks, dtype=int)]

    def log_e(theta0: np.ndarray) -> np.ndarray:
        up, down = theta / theta0[:, None], (1 - theta) / (1 - theta0[:, None])  # [T, M]
        path = np.log(weights) + sum(seen[:, [i]] * np.log(x * up + (1 - x) * down) for i, x in enumerate(kinds))
        top = path.max(axis=1)
        return top + np.log(np.exp(path - top[:, None]).sum(axis=1))

    total = seen.sum(axis=1)
    low, high = _level_set(log_e, np.where(total > 0, seen @ kinds / np.maximum(total, 1), 0.5), ALPHA)
    return 2 * np.maximum.accumulate(low) - 1, 2 * np.minimum.accumulate(high) - 1


# --------------------------------------------------------------------------------------------------------------------
# Position: does the top row win because it is the top row?


def position_statistics(won: Sequence[int], left: Sequence[int], queries: Sequence[Hashable]) -> dict:
    """Bias towards row A, and the preference that is free of it, from the votes that were no ties.

    Args:
        won: +1 or -1 [n], the challenger won or lost; left: +1 or -1 [n], it stood as row A or B; queries: labels [n].
    Bias: exact binomial of "A was chosen". Sides come from a fair coin for each trial, so under no bias these are
    independent fair coins whatever the models are worth and however alike the judges of a query are.
    Preference: the mean of the challenger's win rates as A and as B, for which a habit of the judges cancels even where
    the coin gave one side more often. Interval: Wilson's for the two sides, joined by squares (Newcombe 1998, method
    10; Zou and Donner 2008). p: score test of "the share of A is the same on whichever side the challenger stands"
    (Pearson's chi-square). Where queries have several judges, both count votes down by the design effect (Kish 1965).
    """
    from scipy.special import ndtr

    won, left = np.asarray(won), np.asarray(left)
    chose_a, n = int((won == left).sum()), len(won)
    low, high = wilson(chose_a, n)
    result = {"n": n, "chose_a": chose_a, "share_a": chose_a / n if n else None, "share_a_low": low}
    result |= {"share_a_high": high, "p": binomial_test(chose_a, n)}
    sides = [won[left == side] for side in (1, -1)]
    rates = [float((side > 0).mean()) if len(side) else None for side in sides]
    result |= {"wins_as_a": rates[0], "wins_as_b": rates[1], "n_as_a": len(sides[0]), "n_as_b": len(sides[1])}
    if None in rates:
        return result | {"adjusted": None, "adjusted_low": None, "adjusted_high": None, "adjusted_p": 1.0}
    errors = (won > 0) - np.where(left > 0, rates[0], rates[1])
    effect = _design_effect(errors / np.where(left > 0, len(sides[0]), len(sides[1])), queries)
    value, below, above = sum(rates) / 2, 0.0, 0.0
    for side, rate in zip(sides, rates, strict=True):
        low, high = wilson(rate * len(side) / effect, len(side) / effect)
        below, above = below + (rate - low) ** 2, above + (high - rate) ** 2
    pooled = chose_a / n
    error = math.sqrt(effect * pooled * (1 - pooled) * (1 / len(sides[0]) + 1 / len(sides[1])))
    p = 2 * float(ndtr(-abs(2 * value - 1) / error)) if error else 1.0
    result |= {"adjusted": value, "adjusted_low": value - math.sqrt(below) / 2}
    return result | {"adjusted_high": value + math.sqrt(above) / 2, "adjusted_p": p, "design_effect": effect}


def _design_effect(influence: np.ndarray, queries: Sequence[Hashable]) -> float:
    """Kish's design effect: the variance of an estimate with votes clustered by query over that of independent votes.

    influence: float [n], each vote's share in the estimate's error. At least 1, and 1 with one vote a query.
    """
    if len(set(queries)) == len(queries):
        return 1.0
    sums, sizes = _group_totals(influence, queries)
    alone = (influence**2).sum()
    if not alone:  # every vote the same: as far as anybody can tell the judges of a query are one
        return float((sizes**2).sum() / sizes.sum())
    return max(1.0, float((sums**2).sum() / alone))


# --------------------------------------------------------------------------------------------------------------------
# Categories


def category_statistics(scores: Sequence[float], votes: Sequence[Counter], categories: Sequence[str]) -> list[dict]:
    """Net preference in each category, with Holm's correction over those with at least CATEGORY_VOTES votes.

    Args:
        scores: float [Q], one a query in [-1, 1]; votes: [Q] counts of "win", "loss", "tie"; categories: [Q].
    p is the sign-flip test over the category's queries; None, like p_holm, where votes are too few for a test.
    """
    rows = []
    for name in sorted(set(categories)):
        inside = [i for i, category in enumerate(categories) if category == name]
        total = sum((votes[i] for i in inside), Counter())
        own = np.asarray(scores, dtype=float)[inside]
        low, high = wilson(total["win"], total["win"] + total["loss"])
        row = {"category": name, "queries": len(inside), "votes": total.total(), "wins": total["win"]}
        row |= {"losses": total["loss"], "ties": total["tie"], "net": float(own.mean()), "win_low": low}
        row |= {"win_rate": _ratio(total["win"], total["win"] + total["loss"]), "win_high": high}
        row["p"] = sign_flip_test(own) if total.total() >= CATEGORY_VOTES else None
        rows.append(row)
    tested = [row for row in rows if row["p"] is not None]
    corrected = iter(holm([row["p"] for row in tested]))
    return [row | {"p_holm": next(corrected) if row["p"] is not None else None} for row in rows]


def heterogeneity_test(scores: Sequence[float], categories: Sequence[str], draws: int = 9_999, seed: int = 0) -> float:
    """p-value of "the preference is the same in every category": a permutation test of the variance between them.

    The categories are dealt anew among the queries (seeded); the statistic is the sum of squares between categories.
    Unlike the chi-square test it needs no large categories and no independent judges. One category gives 1.
    """
    scores = np.asarray(scores, dtype=float)
    names, codes, sizes = np.unique(np.asarray(categories, dtype=str), return_inverse=True, return_counts=True)
    if len(names) < 2 or not np.ptp(scores):
        return 1.0
    centered = scores - scores.mean()
    observed = (np.bincount(codes, weights=centered) ** 2 / sizes).sum()
    draws = max(999, min(draws, 100 * BLOCK // len(scores)))  # bounded work on very long logs
    rng, extreme = np.random.default_rng(seed), 0
    order = np.argsort(codes, kind="stable")
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    step = max(1, BLOCK // len(scores))
    for start in range(0, draws, step):
        dealt = rng.permuted(np.tile(centered[order], (min(step, draws - start), 1)), axis=1)
        between = (np.add.reduceat(dealt, starts, axis=1) ** 2 / sizes).sum(axis=1)
        extreme += int((between >= observed * (1 - 1e-12)).sum())
    return (1 + extreme) / (draws + 1)


# --------------------------------------------------------------------------------------------------------------------
# Agreement


def krippendorff_alpha(units: Sequence[Sequence[Hashable]], draws: int = 1_000, seed: int = 0) -> dict:
    """Krippendorff's alpha for nominal labels, with any number of judges a unit (Krippendorff 2011).

    Args:
        units: for each query the labels that its judges gave; units with fewer than two say nothing and are left out.
    alpha = 1 - observed / expected disagreement; agreement is the raw share of agreeing pairs of judges, each label
    weighing the same. 95% percentile interval over units drawn with replacement. alpha is None when every label is
    the same, for then nothing could have disagreed.
    """
    pairable = [Counter(unit) for unit in units if len(unit) >= 2]
    result = {"units": len(pairable), "labels": sum(unit.total() for unit in pairable), "agreement": None}
    result |= {"alpha": None, "low": None, "high": None}
    if not pairable:
        return result
    labels = sorted({label for unit in pairable for label in unit}, key=str)
    counts = np.array([[unit[label] for label in labels] for unit in pairable], dtype=float)  # [units, labels]
    size = counts.sum(axis=1)
    apart = (size**2 - (counts**2).sum(axis=1)) / (size - 1)  # ordered disagreeing pairs, each weighing 1 / (m - 1)
    parts = np.column_stack([apart, counts])

    def alpha(totals: np.ndarray) -> np.ndarray:  # [B, 1 + labels] -> [B]
        each = totals[:, 1:]
        n = each.sum(axis=1)
        expected = (n**2 - (each**2).sum(axis=1)) / (n - 1)
        return 1 - np.divide(totals[:, 0], expected, out=np.full(len(n), np.nan), where=expected > 0)

    total = parts.sum(axis=0, keepdims=True)
    result["agreement"] = float(1 - total[0, 0] / size.sum())
    value = float(alpha(total)[0])
    if math.isnan(value):
        return result
    rng = np.random.default_rng(seed)
    drawn = alpha(rng.multinomial(len(parts), np.full(len(parts), 1 / len(parts)), size=draws) @ parts)
    drawn = drawn[~np.isnan(drawn)]
    low, high = np.quantile(drawn, [ALPHA / 2, 1 - ALPHA / 2]) if len(drawn) else (value, value)
    return result | {"alpha": value, "low": float(low), "high": float(high)}


# --------------------------------------------------------------------------------------------------------------------
# Votes needed


@functools.cache
def votes_needed(rate: float, power: float = 0.8, alpha: float = ALPHA) -> int:
    """Non-tied votes with which the exact two-sided binomial test finds a true win rate with at least this power.

    Exact power, not the normal approximation: the smallest n from which on no larger n falls below `power` (exact
    power saws up and down with n). At 80% and 5%: 0.55 -> 820, 0.60 -> 210, 0.65 -> 97.
    """
    from scipy.special import bdtr, ndtri

    gap = abs(rate - 0.5)
    if not 0.01 <= gap < 0.5:
        raise ValueError(f"the win rate must differ from 0.5 by at least 0.01 and be below 1, got {rate}")
    rough = ((ndtri(1 - alpha / 2) * 0.5 + ndtri(power) * math.sqrt(rate * (1 - rate))) / gap) ** 2
    n = np.arange(1, math.ceil(1.2 * rough + 8 / gap) + 20)
    edge = np.floor(n / 2 - ndtri(1 - alpha / 2) * np.sqrt(n) / 2)[:, None] + np.arange(-3, 4)  # where the tail ends
    fits = (edge >= 0) & (bdtr(np.maximum(edge, 0), n[:, None], 0.5) <= alpha / 2)
    last = np.where(fits, edge, -1).max(axis=1)  # the largest count of losses (or wins) that still rejects
    lose = np.where(last >= 0, bdtr(np.maximum(last, 0), n, 1 - rate) + bdtr(np.maximum(last, 0), n, rate), 0.0)
    return int(n[lose < power].max()) + 1


# --------------------------------------------------------------------------------------------------------------------
# Ranking of several models


def bradley_terry(wins: np.ndarray, prior: float = 1.0) -> np.ndarray:
    """Log-strengths, float [..., M] with mean 0, from wins[..., i, j] of i over j; a tie is half a win for each.

    P(i beats j) = 1 / (1 + exp(strength_j - strength_i)) (Bradley and Terry 1952), fitted by the MM algorithm (Hunter
    2004). Each model also plays `prior` drawn games against an average one, which keeps a model that won everything
    finite and groups that never met comparable; against a hundred votes it weighs nothing.
    """
    wins = np.asarray(wins, dtype=float)
    games = wins + np.swapaxes(wins, -1, -2)
    won = wins.sum(axis=-1) + prior / 2
    strength = np.ones(won.shape)
    for _ in range(10_000):
        expected = (games / (strength[..., :, None] + strength[..., None, :])).sum(axis=-1) + prior / (strength + 1)
        new = won / expected
        done = abs(np.log(new / strength)).max(initial=0) < 1e-9
        strength = new
        if done:
            break
    log = np.log(strength)
    return log - log.mean(axis=-1, keepdims=True)


def rank_models(votes: Sequence[tuple], models: Sequence[str], draws: int = 1_000, seed: int = 0) -> list[dict]:
    """Models from strongest to weakest by Bradley-Terry, with 95% bootstrap intervals over queries.

    Args:
        votes: (query, winner, loser, weight) where a tie is given both ways with weight 1/2.
    Queries are drawn whole, since the judges and the model pairs of one query share its picture. `win_rate` is the
    chance against an average model; `first` the share of resamples that put the model on top.
    """
    place = {model: i for i, model in enumerate(models)}
    queries = {query: i for i, query in enumerate(dict.fromkeys(vote[0] for vote in votes))}
    table = np.zeros((len(queries), len(models), len(models)))
    for query, winner, loser, weight in votes:
        table[queries[query], place[winner], place[loser]] += weight
    strength = bradley_terry(table.sum(axis=0))
    if not queries:
        return []
    rng, flat = np.random.default_rng(seed), table.reshape(len(queries), -1)
    times = rng.multinomial(len(queries), np.full(len(queries), 1 / len(queries)), size=draws)
    drawn = bradley_terry((times @ flat).reshape(draws, len(models), len(models)))  # [draws, M]
    low, high = np.quantile(drawn, [ALPHA / 2, 1 - ALPHA / 2], axis=0)
    first = np.bincount(drawn.argmax(axis=1), minlength=len(models)) / draws
    games = table.sum(axis=0) + table.sum(axis=0).T
    rows = []
    for rank, i in enumerate(np.argsort(-strength, kind="stable"), start=1):
        row = {"model": models[i], "rank": rank, "strength": float(strength[i]), "low": float(low[i])}
        row |= {"high": float(high[i]), "win_rate": 1 / (1 + math.exp(-strength[i])), "first": float(first[i])}
        rows.append(row | {"votes": round(float(games[i].sum()))})
    return rows


# --------------------------------------------------------------------------------------------------------------------
# What the rows held


def overlap(first: Sequence, second: Sequence) -> int:
    """Number of results that both lists hold, whatever their ranks: overlap@k for lists of k."""
    return len(set(first) & set(second))


def results_distribution(lists: Sequence[tuple[Sequence, Sequence]]) -> dict:
    """How the two models' lists differ, from one (challenger's, base's) pair of id lists a query.

    overlap: {shared results: queries}; `differs`[r]: share of queries whose results at rank r + 1 differ;
    same_set: queries with the same results in another order.
    """
    shared = Counter(overlap(a, b) for a, b in lists)
    depth = max((max(len(a), len(b)) for a, b in lists), default=0)
    differs = [sum(list(a[r : r + 1]) != list(b[r : r + 1]) for a, b in lists) / len(lists) for r in range(depth)]
    same_set = sum(set(a) == set(b) and list(a) != list(b) for a, b in lists)
    mean = sum(k * count for k, count in shared.items()) / len(lists) if lists else None
    result = {"queries": len(lists), "k": depth, "overlap": {str(k): shared[k] for k in range(depth + 1)}}
    return result | {"mean_overlap": mean, "differs": differs, "same_set": same_set}


def attribute_agreement(won: Sequence[dict], lost: Sequence[dict], queries: Sequence[Hashable]) -> list[dict]:
    """Share of results that agree with the query, in the rows that won and in those that lost.

    Args:
        won, lost: [n] {attribute: share in [0, 1], or None where the query has none}, one of each a decisive vote.
    difference is won minus lost with its paired bootstrap interval over queries.
    """
    rows = []
    for name in sorted({name for row in [*won, *lost] for name in row}):
        known = [i for i in range(len(won)) if won[i].get(name) is not None and lost[i].get(name) is not None]
        if not known:
            continue
        lose, win = ([float(side[i][name]) for i in known] for side in (lost, won))
        result = paired_bootstrap(lose, win, groups=[queries[i] for i in known])
        row = {"attribute": name, "votes": len(known), "won": float(np.mean(win)), "lost": float(np.mean(lose))}
        rows.append(row | {"difference": result.mean, "low": result.low, "high": result.high, "p": result.p})
    return rows


# --------------------------------------------------------------------------------------------------------------------
# The results page


def arena_statistics(votes: Sequence[dict], seed: int = 0) -> dict:
    """Everything the results page shows, as JSON-ready values (absent numbers are None), from the vote log.

    Args:
        votes: the log's rows in the order in which they were cast. A row is a dict with
            trial      str, unique                      judge      str
            query      str, the unit of all tests       category   str, the query's object type
            choice     "A" | "B" | "T" (tie) | "N" (abstained)
            left       model shown as row A             right      model shown as row B
            base       "left"'s or "right"'s model: the one compared against; the other is the challenger
            items      {model: [ids in rank order]}, by picture digest so that equal pictures are equal
          and may have
            identical  True: both lists are the same, nothing was asked (choice is ignored and may be None)
            revoked    True: the judge took the vote back
            judges     how many judges the query was planned for, known before its first vote (default 1)
            attributes {model: {attribute: share of its results that agree with the query, or None}}
            time       any JSON value; handed on in the series
    Every row is counted once: as a vote, or under `excluded` by its reason: "undone", "identical", "abstained", or
    "repeat" (the judge has answered this query for these models before; it shows only in `consistency`).
    Returns {"votes": counts, "pairs": [see `_pair_statistics`], "ranking": [see `rank_models`] or None for two models,
    "judges": [one row a judge]}.
    Raises ValueError for a missing key, an unknown choice, a base that was not shown, or a trial that comes twice.
    """
    _check_votes(votes)
    pairs: dict[tuple, dict[str, list]] = {}
    reasons, judges = Counter(), {}
    answered: dict[tuple, dict] = {}
    for vote in votes:
        base, challenger = _pair(vote)
        pair = pairs.setdefault((challenger, base), {"answers": [], "identical": [], "repeat": []})
        key = (vote["judge"], vote["query"], challenger, base)
        reason = _exclusion(vote, key in answered)
        if reason == "undone":
            reasons[reason] += 1
            continue
        if reason != "identical":
            tally = judges.setdefault(vote["judge"], Counter())
            tally[{"repeat": "repeats", "abstained": "abstained"}.get(reason, vote["choice"])] += 1
        if reason == "repeat":
            pair["repeat"].append((answered[key], vote))
        elif reason == "identical":
            pair["identical"].append(vote)
        else:
            pair["answers"].append(vote)
            if not reason:
                answered[key] = vote
        if reason:
            reasons[reason] += 1
    results = [_pair_statistics(*names, rows, seed) for names, rows in sorted(pairs.items())]
    for part in ("planned", "anytime"):  # Holm holds under any dependence, and at any time for p-values that do
        for result, p in zip(results, holm([result[part]["p"] for result in results]), strict=True):
            result[part]["p_holm"] = p
    for result in results:
        result["verdict"] = _verdict(result, len(results))
    excluded = {reason: reasons[reason] for reason in ("undone", "identical", "abstained", "repeat")}
    counts = {"rows": len(votes), "counted": len(answered), "excluded": excluded, "judges": len(judges)}
    return {"votes": counts, "pairs": results, "ranking": _ranking(pairs, seed), "judges": _judge_rows(judges)}


def _check_votes(votes: Sequence[dict]) -> None:
    trials = set()
    for vote in votes:
        missing = {"trial", "judge", "query", "category", "choice", "left", "right", "base", "items"} - set(vote)
        if missing:
            raise ValueError(f"vote {vote.get('trial')!r} lacks {', '.join(sorted(missing))}")
        name = f"vote {vote['trial']!r}"
        if not vote.get("identical") and vote["choice"] not in CHOICES:
            raise ValueError(f"{name} has the unknown choice {vote['choice']!r}; known are {', '.join(CHOICES)}")
        if vote["left"] == vote["right"] or vote["base"] not in (vote["left"], vote["right"]):
            raise ValueError(f"{name} shows {vote['left']!r} and {vote['right']!r} with base {vote['base']!r}")
        if not {vote["left"], vote["right"]} <= set(vote["items"]):
            raise ValueError(f"{name} has items of {sorted(vote['items'])}, not of the models it shows")
        if vote["trial"] in trials:
            raise ValueError(f"{name} comes twice")
        trials.add(vote["trial"])
    both = {frozenset(_pair(vote)): _pair(vote) for vote in votes}
    for vote in votes:
        if both[frozenset(_pair(vote))] != _pair(vote):
            raise ValueError(f"{' and '.join(sorted(_pair(vote)))} are each the base of the other in some votes")


def _exclusion(vote: dict, seen: bool) -> str | None:
    if vote.get("revoked"):
        return "undone"
    if vote.get("identical"):
        return "identical"
    if vote["choice"] == "N":
        return "abstained"
    return "repeat" if seen else None


def _pair(vote: dict) -> tuple[str, str]:
    """(base, challenger)."""
    return vote["base"], vote["right"] if vote["base"] == vote["left"] else vote["left"]


def _outcome(vote: dict) -> int:
    """+1 when the challenger won, -1 when the base did, 0 for a tie."""
    if vote["choice"] == "T":
        return 0
    return -1 if vote[CHOICES[vote["choice"]]] == vote["base"] else 1


def _pair_statistics(challenger: str, base: str, rows: dict[str, list], seed: int) -> dict:
    """The results of one pair of models; wins are the challenger's, rates are of wins, nets are wins minus losses.

    counts: wins, losses, ties, votes, abstained, queries, judges.
    win_rate, tie_rate: {"value", "low", "high", "n"}, Wilson's, of votes counted down by the design effect where
        queries have several judges. net: {"value", "low", "high"}, bootstrap over queries.
    identical: {"queries", "share" of all queries}.
    planned: {"p": sign-flip over queries, "p_binomial": over votes, "independent": whether one vote a query makes the
        binomial valid, "p_holm": p corrected over pairs of models}.
    anytime: {"e", "log10_e": now; "max_e", "direction": so far, and who led then; "p": 1 / max E; "p_holm";
        "threshold": 20; "net_low", "net_high": confidence sequence of the net preference; "win_low", "win_high": of
        the win rate, from each query's first vote; "closed", "open": queries that count, and that wait for judges}.
    verdict: {"answer": a model's name, "not yet", "no difference shown" or "no votes"; "sentence"}.
    heterogeneity: {"p", "categories"}. consistency: {"repeats", "same_model", "same_row"}.
    position, categories, agreement, needed, results, attributes: see the functions of these names.
    series: {"votes": {"n", "wins", "losses", "ties", "time"}, "e": {"queries", "votes", "log10_e", "net_low",
        "net_high"}, "win_rate": {"n", "value", "low", "high"}}, lists of at most LOOKS points that start at 0.
    """
    counted = [vote for vote in rows["answers"] if vote["choice"] != "N"]
    outcomes = [_outcome(vote) for vote in counted]
    by_query: dict[str, list[int]] = {}
    for vote, outcome in zip(counted, outcomes, strict=True):
        by_query.setdefault(vote["query"], []).append(outcome)
    scores = [sum(values) / len(values) for values in by_query.values()]
    wins, losses, ties = (outcomes.count(value) for value in (1, -1, 0))
    first = {vote["query"]: vote for vote in reversed(counted)}
    judges = {vote["judge"] for vote in counted}
    counts = {"wins": wins, "losses": losses, "ties": ties, "votes": len(counted)}
    counts["abstained"] = len(rows["answers"]) - len(counted)
    counts |= {"queries": len(by_query), "judges": len(judges)}
    same = {vote["query"] for vote in rows["identical"]} - set(by_query)
    anytime, series = _anytime(rows["answers"])
    planned = {"p": sign_flip_test(scores, seed=seed), "p_binomial": binomial_test(wins, wins + losses)}
    planned["independent"] = len(by_query) == len(counted)
    decisive = [(vote, outcome) for vote, outcome in zip(counted, outcomes, strict=True) if outcome]
    won = [outcome for _, outcome in decisive]
    left = [1 if vote["right"] == base else -1 for vote, _ in decisive]
    pictures = [vote["query"] for vote, _ in decisive]
    categories = [first[query]["category"] for query in by_query]
    tallies = [Counter({1: "win", -1: "loss", 0: "tie"}[value] for value in values) for values in by_query.values()]
    labels = [[(base, "tie", challenger)[value + 1] for value in values] for values in by_query.values()]
    net = paired_bootstrap(np.zeros(len(scores)), scores, seed=seed) if scores else Difference(0.0, None, None, 1.0)
    return {
        "challenger": challenger,
        "base": base,
        "counts": counts,
        "win_rate": _rate([outcome > 0 for outcome in won], pictures),
        "tie_rate": _rate([not outcome for outcome in outcomes], [vote["query"] for vote in counted]),
        "net": {"value": net.mean if scores else None, "low": net.low, "high": net.high},
        "identical": {"queries": len(same), "share": _ratio(len(same), len(same) + len(by_query))},
        "planned": planned,
        "anytime": anytime,
        "position": position_statistics(won, left, pictures),
        "categories": category_statistics(scores, tallies, categories),
        "heterogeneity": {"p": heterogeneity_test(scores, categories, seed=seed), "categories": len(set(categories))},
        "agreement": krippendorff_alpha(labels, seed=seed),
        "consistency": _consistency(rows["repeat"]),
        "needed": _needed(wins + losses, ties),
        "results": results_distribution([(vote["items"][challenger], vote["items"][base]) for vote in first.values()]),
        "attributes": _attributes(decisive, challenger, base),
        "series": series,
    }


def _anytime(answers: list[dict]) -> tuple[dict, dict]:
    """The e-process over closed queries, its confidence sequences, and the series that the plots draw."""
    closed, waiting = closed_scores(answers)
    log_e = query_log_e([score for score, _ in closed]) if closed else np.zeros(0)
    looks = _looks(len(closed))
    low, high = query_confidence_sequence([score for score, _ in closed], looks)
    first, votes = {}, [vote for vote in answers if vote["choice"] != "N"]
    for vote in votes:
        first.setdefault(vote["query"], _outcome(vote))
    decisive = np.array([outcome for outcome in first.values() if outcome])
    course = [np.concatenate([[0], np.cumsum(decisive == value)]) for value in (1, -1)]
    win_low, win_high = confidence_sequence(*course)
    now = float(log_e[-1]) / math.log(10) if len(log_e) else 0.0
    peak = int(np.argmax(log_e)) if len(log_e) else 0
    result = {"e": 10 ** min(now, 300.0), "log10_e": now, "p": anytime_p(log_e), "threshold": 1 / ALPHA}
    result["max_e"] = math.exp(min(float(log_e[peak]), 690.0)) if len(log_e) else 1.0
    result["direction"] = int(np.sign(sum(score for score, _ in closed[: peak + 1])))
    result |= {"net_low": float(low[-1]), "net_high": float(high[-1]), "closed": len(closed), "open": waiting}
    result |= {"win_low": float(win_low[-1]), "win_high": float(win_high[-1])}
    outcomes = np.array([_outcome(vote) for vote in votes])
    picks, ends = _looks(len(votes)), _looks(len(decisive))
    totals = {name: np.concatenate([[0], np.cumsum(outcomes == value)]) for name, value in OUTCOMES.items()}
    series = {"votes": {"n": picks} | {name: total[picks].tolist() for name, total in totals.items()}}
    series["votes"]["time"] = [votes[n - 1].get("time") if n else None for n in picks]
    series["e"] = {"queries": looks, "votes": [closed[n - 1][1] if n else 0 for n in looks]}
    series["e"]["log10_e"] = [float(log_e[n - 1]) / math.log(10) if n else 0.0 for n in looks]
    series["e"] |= {"net_low": low.tolist(), "net_high": high.tolist()}
    series["win_rate"] = {"n": ends, "value": [_ratio(int(course[0][n]), n) for n in ends]}
    series["win_rate"] |= {"low": win_low[ends].tolist(), "high": win_high[ends].tolist()}
    return result, series


def closed_scores(answers: Sequence[dict]) -> tuple[list[tuple[float, int]], int]:
    """(score, votes so far) of each query in the order of closing, and how many queries are still open.

    A query enters the e-process once, with the mean of its votes when it closes: when its planned judges have
    answered, or when PATIENCE further queries have been opened; while all its judges abstained it waits for the first
    who votes. That depends on the schedule and never on which model was preferred. A score that moved with each further
    judge would not do: judges of one picture agree, so people who look between them could stop at the better half of
    the judges. Later votes count everywhere but here.
    """
    scores: list[tuple[float, int]] = []
    open_queries: dict[str, list] = {}  # query -> [opened as number, planned judges, answers, votes]
    opened, voted, finished = 0, 0, set()

    def close(query: str) -> None:
        values = open_queries[query][3]
        if values:
            del open_queries[query]
            finished.add(query)
            scores.append((sum(values) / len(values), voted))

    for vote in answers:
        query = vote["query"]
        voted += vote["choice"] != "N"
        if query in finished:
            continue
        if query not in open_queries:
            opened += 1
            open_queries[query] = [opened, int(vote.get("judges") or 1), 0, []]
            for old in [name for name, state in open_queries.items() if opened - state[0] >= PATIENCE]:
                close(old)
        state = open_queries[query]
        state[2] += 1
        if vote["choice"] != "N":
            state[3].append(_outcome(vote))
        if state[2] >= state[1]:
            close(query)
    return scores, len(open_queries)


def _verdict(pair: dict, pairs: int) -> dict:
    """The sentence that the page says, and the answer as one word for programs, from p-values corrected over pairs."""
    planned, anytime = pair["planned"]["p_holm"], pair["anytime"]["p_holm"]
    direction, best = pair["anytime"]["direction"], pair["anytime"]["max_e"]
    better, worse = (pair["challenger"], pair["base"])[:: 1 if direction > 0 else -1]
    among = f" (p corrected for {pairs} pairs of models)" if pairs > 1 else ""
    if not pair["counts"]["votes"]:
        return {"answer": "no votes", "sentence": "No votes yet."}
    if anytime <= ALPHA:
        sentence = f"{better} is preferred to {worse}: E reached {best:.4g}, {_p(anytime)}{among}"
        sentence += ", which holds however often the votes were looked at."
        if pair["net"]["value"] * direction < 0:
            sentence += " The votes have turned since: look at their course before deciding."
        return {"answer": better, "sentence": sentence}
    needs = f"of the {1 / ALPHA:.0f} it needs" if pairs == 1 else f"and {_p(anytime)}"
    early = f"the test that stays valid when people look early has reached E {best:.3g} {needs}{among}."
    if planned <= ALPHA:
        sentence = f"Not yet: {_p(planned)} would do at an end planned beforehand, but {early}"
        return {"answer": "not yet", "sentence": sentence}
    return {"answer": "no difference shown", "sentence": f"No difference shown so far: {_p(planned)}, and {early}"}


def _p(p: float) -> str:
    return f"p {p:.2g}" if p >= 1e-12 else "p below 1e-12"


def _looks(count: int) -> list[int]:
    """At most LOOKS numbers from 0 to count, evenly spread, both ends among them."""
    return np.unique(np.rint(np.linspace(0, count, min(count + 1, LOOKS))).astype(int)).tolist()


def _needed(have: int, ties: int) -> list[dict]:
    """For each win rate the non-tied votes that find it, those still missing, and all votes that takes with ties."""
    rows = []
    for rate in (0.55, 0.60, 0.65):
        missing = max(0, votes_needed(rate) - have)
        whole = math.ceil(missing * (have + ties) / have) if have else missing
        rows.append({"rate": rate, "needed": votes_needed(rate), "missing": missing, "missing_with_ties": whole})
    return rows


def _consistency(repeats: list[tuple[dict, dict]]) -> dict:
    """How often a judge who saw a query again, sides exchanged, preferred the same model, and the same row."""
    same = sum(_outcome(old) == _outcome(new) for old, new in repeats)
    row = sum(old["choice"] == new["choice"] != "T" for old, new in repeats)
    return {"repeats": len(repeats), "same_model": _ratio(same, len(repeats)), "same_row": _ratio(row, len(repeats))}


def _attributes(decisive: list[tuple[dict, int]], challenger: str, base: str) -> list[dict]:
    known = [(vote, outcome) for vote, outcome in decisive if vote.get("attributes")]
    sides = [(challenger, base) if outcome > 0 else (base, challenger) for _, outcome in known]
    won = [vote["attributes"].get(side[0], {}) for (vote, _), side in zip(known, sides, strict=True)]
    lost = [vote["attributes"].get(side[1], {}) for (vote, _), side in zip(known, sides, strict=True)]
    return attribute_agreement(won, lost, [vote["query"] for vote, _ in known])


def _ranking(pairs: dict[tuple, dict], seed: int) -> list[dict] | None:
    models = sorted({model for pair in pairs for model in pair})
    if len(models) < 3:
        return None
    games = []
    for (challenger, base), rows in sorted(pairs.items()):
        for vote in rows["answers"]:
            if vote["choice"] != "N":
                up = (1 + _outcome(vote)) / 2
                games += [(vote["query"], challenger, base, up), (vote["query"], base, challenger, 1 - up)]
    return rank_models(games, models, seed=seed)


def _judge_rows(judges: dict[str, Counter]) -> list[dict]:
    rows = []
    for judge, tally in sorted(judges.items()):
        row = {"judge": judge, "votes": tally["A"] + tally["B"] + tally["T"], "ties": tally["T"]}
        row |= {"abstained": tally["abstained"], "repeats": tally["repeats"]}
        rows.append(row | {"share_a": _ratio(tally["A"], tally["A"] + tally["B"])})
    return rows


def _rate(hits: Sequence[bool], queries: Sequence[Hashable]) -> dict:
    """Share of votes with Wilson's interval, the votes counted down by the design effect of their queries."""
    n, value = len(hits), _ratio(sum(hits), len(hits))
    effect = _design_effect(np.asarray(hits) - value, queries) if n else 1.0
    low, high = wilson(sum(hits) / effect, n / effect)
    return {"value": value, "low": low, "high": high, "n": n}


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
