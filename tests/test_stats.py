"""stats.py against fixtures worked out elsewhere, scipy, and naive calculations written out here."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

import stats

# --------------------------------------------------------------------------------------------------------------------
# Intervals and corrections


def test_wilson_fixture_and_edges():
    low, high = stats.wilson(120, 200)
    assert (round(low, 3), round(high, 3)) == (0.531, 0.665)
    for wins, n in [(0, 1), (1, 1), (3, 7), (0, 50), (50, 50), (99_999, 100_000)]:
        theirs = scipy_stats.binomtest(wins, n).proportion_ci(method="wilson")
        assert stats.wilson(wins, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert stats.wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="wins=3, n=2"):
        stats.wilson(3, 2)


def test_holm_against_the_definition():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    rng = np.random.default_rng(0)
    for count in range(1, 8):
        p = rng.random(count) ** 2
        ordered = sorted(p)
        naive = [max(min(1, (count - j) * ordered[j]) for j in range(ordered.index(x) + 1)) for x in p]
        assert stats.holm(p) == pytest.approx(naive)
    assert stats.holm([]) == []
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        stats.holm([0.1, float("nan")])


# --------------------------------------------------------------------------------------------------------------------
# Paired bootstrap


def _covers(draw, truth, cases=1000):
    hits = 0
    for case in range(cases):
        b, groups = draw()
        result = stats.paired_bootstrap(np.zeros(len(b)), b, draws=1000, seed=case, groups=groups)
        hits += result.low <= truth <= result.high
    return hits / cases


@pytest.mark.parametrize("count", [50, 100, 200])
@pytest.mark.parametrize("kind", ["normal", "skewed", "recall", "reciprocal", "clusters"])
def test_the_bootstrap_interval_covers_the_truth(kind, count):
    rng = np.random.default_rng(count)

    def clusters():
        groups = np.repeat(np.arange(count), rng.integers(1, 4, size=count))
        return rng.normal(size=count)[groups] + 0.3 * rng.normal(size=len(groups)), groups

    worse = (1 / np.arange(1, 20)).mean() - (1 / np.arange(1, 15)).mean()
    draw, truth = {
        "normal": (lambda: (rng.normal(size=count), None), 0),
        "skewed": (lambda: (rng.exponential(size=count), None), 1),
        "recall": (lambda: (rng.choice([-1.0, 0, 1], size=count, p=[0.1, 0.7, 0.2]), None), 0.1),
        "reciprocal": (
            lambda: (1 / rng.integers(1, 20, size=count) - 1 / rng.integers(1, 15, size=count), None),
            worse,
        ),
        "clusters": (clusters, 0),
    }[kind]
    assert 0.93 <= _covers(draw, truth) <= 0.97


def test_p_agrees_with_the_interval_and_with_the_t_test():
    rng = np.random.default_rng(3)
    seen = set()
    for case in range(300):
        b = rng.normal(0.25, 1, size=60) if case % 2 else rng.choice([-1.0, 0, 1], size=60, p=[0.1, 0.65, 0.25])
        result = stats.paired_bootstrap(np.zeros(60), b, draws=1000, seed=case)
        outside = result.low > 0 or result.high < 0
        seen.add(outside)
        assert (result.p <= 0.05) == outside
        if case % 2:
            assert result.p == pytest.approx(scipy_stats.ttest_1samp(b, 0).pvalue, abs=0.07)
    assert seen == {True, False}


def test_exchanging_the_models_mirrors_the_difference():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=80), rng.normal(0.4, 1, size=80)
    there, back = stats.paired_bootstrap(a, b), stats.paired_bootstrap(b, a)
    assert there.mean == pytest.approx((b - a).mean()) and back.mean == -there.mean
    assert (back.low, back.high, back.p) == pytest.approx((-there.high, -there.low, there.p))
    assert stats.paired_bootstrap(a, b, seed=0) == there != stats.paired_bootstrap(a, b, seed=1)


def test_few_kinds_of_groups_have_the_distribution_of_drawn_groups():
    values = np.random.default_rng(5).choice([-1.0, 0, 1], size=400, p=[0.1, 0.6, 0.3])
    residuals, ones = values - values.mean(), np.ones(400)
    fast = stats._studentised(residuals, ones, 0.0, 20_000, np.random.default_rng(0))
    drawn = values[np.random.default_rng(1).integers(0, 400, size=(20_000, 400))]
    naive = abs(drawn.mean(axis=1) - values.mean()) / (drawn.std(axis=1, ddof=1) / 20)
    assert np.quantile(fast, [0.5, 0.9, 0.95, 0.99]) == pytest.approx(
        np.quantile(naive, [0.5, 0.9, 0.95, 0.99]), abs=0.05
    )


def test_groups_of_several_sizes_are_studentised_as_by_hand():
    rng = np.random.default_rng(8)
    sums, sizes = rng.normal(size=12), rng.integers(1, 5, size=12).astype(float)
    mean = sums.sum() / sizes.sum()
    far = stats._studentised(sums - mean * sizes, sizes, 0.0, 5, np.random.default_rng(0))
    picks = np.random.default_rng(0).integers(0, 12, size=(5, 12), dtype=np.int32)
    for pick, value in zip(picks, far, strict=True):
        drawn = sums[pick].sum() / sizes[pick].sum()
        error = np.sqrt(12 / 11 * sum((sums[g] - drawn * sizes[g]) ** 2 for g in pick)) / sizes[pick].sum()
        assert value == pytest.approx(abs(drawn - mean) / error)


def test_copies_in_a_group_add_no_certainty():
    rng = np.random.default_rng(6)
    values = rng.normal(size=50)
    once = stats.paired_bootstrap(np.zeros(50), values)
    copied = stats.paired_bootstrap(
        np.zeros(500), np.repeat(values, 10), groups=[str(i) for i in range(50) for _ in range(10)]
    )
    assert copied == pytest.approx(once)


def test_blocks_bound_memory_without_changing_the_kind_of_answer(monkeypatch):
    values = np.random.default_rng(7).normal(size=300)
    whole = stats.paired_bootstrap(np.zeros(300), values)
    monkeypatch.setattr(stats, "BLOCK", 10_000)
    blocks = stats.paired_bootstrap(np.zeros(300), values)
    assert blocks == pytest.approx(whole, abs=0.02)


def test_bootstrap_edges():
    assert stats.paired_bootstrap([1.0], [2.0]) == (1.0, None, None, 1.0)
    assert stats.paired_bootstrap([1.0] * 5, [1.0] * 5) == (0.0, 0.0, 0.0, 1.0)
    assert stats.paired_bootstrap([0.0] * 10, [1.0] * 10) == (1.0, 1.0, 1.0, 2.0**-9)
    assert stats.paired_bootstrap([0.0] * 3, [1.0] * 3) == (1.0, None, None, 0.25)
    assert stats.paired_bootstrap([0.0] * 4, [1.0] * 4, groups=["x"] * 4).p == 1.0
    for a, b, more in [([], [], {}), ([1.0], [1.0, 2.0], {}), ([float("nan")] * 3, [1.0] * 3, {})]:
        with pytest.raises(ValueError):
            stats.paired_bootstrap(a, b, **more)
    with pytest.raises(ValueError, match="2 groups and 3 scores"):
        stats.paired_bootstrap([0.0] * 3, [1.0] * 3, groups=["x", "y"])
