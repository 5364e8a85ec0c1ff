"""stats.py against fixtures worked out elsewhere, scipy, and naive calculations written out here."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
from scipy import integrate, optimize
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
        result = stats.paired_bootstrap(np.zeros(len(b)), b, draws=499, seed=case, groups=groups)
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


def test_blocks_bound_memory_without_changing_the_answer(monkeypatch):
    values = np.random.default_rng(7).normal(size=300)
    whole = stats.paired_bootstrap(np.zeros(300), values)
    monkeypatch.setattr(stats, "BLOCK", 7_000)
    blocks = stats.paired_bootstrap(np.zeros(300), values)
    assert blocks == pytest.approx(whole)


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


# --------------------------------------------------------------------------------------------------------------------
# Tests for a planned end


def test_binomial_fixtures_scipy_and_edges():
    assert stats.binomial_test(120, 200) == pytest.approx(0.0057, abs=5e-5)
    assert stats.binomial_test(65, 100) == pytest.approx(0.0035, abs=5e-5)
    for wins, n in [(0, 1), (3, 10), (5, 10), (7, 7), (50_300, 100_000), (49_000, 100_000)]:
        assert stats.binomial_test(wins, n) == pytest.approx(scipy_stats.binomtest(wins, n).pvalue, rel=1e-9)
    assert stats.binomial_test(0, 0) == 1.0
    assert 0 <= stats.binomial_test(100_000, 100_000) < 1e-300


def test_sign_flips_are_the_binomial_on_wins_and_losses():
    for wins, losses, ties in [(0, 0, 0), (0, 0, 5), (1, 0, 0), (120, 80, 40), (65, 35, 0), (10, 10, 1)]:
        scores = [1] * wins + [-1] * losses + [0] * ties
        assert stats.sign_flip_test(scores) == pytest.approx(stats.binomial_test(wins, wins + losses), rel=1e-9)


def test_sign_flips_against_all_flips_written_out():
    rng = np.random.default_rng(10)
    for _ in range(20):
        scores = np.round(rng.integers(-6, 7, size=9) / rng.choice([2, 3, 5, 6], size=9), 12).clip(-1, 1)
        sums = np.array(list(itertools.product([-1, 1], repeat=9))) @ abs(scores)
        naive = (abs(sums) >= abs(scores.sum()) - 1e-9).mean()
        assert stats.sign_flip_test(scores) == pytest.approx(naive)


def test_sampled_sign_flips_agree_with_the_exact_ones():
    rng = np.random.default_rng(11)
    few = rng.choice([-1, -1 / 3, 1 / 3, 1], size=300, p=[0.2, 0.25, 0.25, 0.3])
    exact = stats.sign_flip_test(few)
    generator = np.random.default_rng(0)
    assert stats._sampled_flips(abs(few), abs(few.sum()), 50_000, generator) == pytest.approx(exact, abs=0.01)
    odd = few * (1 + 1e-4 * rng.random(300)) / 1.0002  # multiples of no small fraction: Monte Carlo
    assert stats.sign_flip_test(odd) == pytest.approx(exact, abs=0.03)  # and no longer any sums that tie
    assert stats.sign_flip_test(odd) == stats.sign_flip_test(odd)
    assert stats.sign_flip_test(np.ones(100_000)) < 1e-3  # too long to enumerate, still quick


# --------------------------------------------------------------------------------------------------------------------
# The test that stays valid when people look early


def test_e_value_fixtures_and_the_integral():
    assert math.exp(stats.log_e_value(120, 80)) == pytest.approx(11.74, abs=0.005)
    assert math.exp(stats.log_e_value(65, 35)) == pytest.approx(18.47, abs=0.005)
    for wins, losses, theta in [(0, 0, 0.5), (7, 2, 0.5), (30, 41, 0.4), (12, 0, 0.7)]:
        mixture, _ = integrate.quad(
            lambda q, w=wins, n=losses, t=theta: (
                scipy_stats.beta.pdf(q, 10, 10) * (q / t) ** w * ((1 - q) / (1 - t)) ** n
            ),
            0,
            1,
        )
        assert math.exp(stats.log_e_value(wins, losses, theta=theta)) == pytest.approx(mixture, rel=1e-7)


def test_e_value_is_safe_at_the_edges():
    assert stats.log_e_value(0, 0) == 0.0
    for wins, losses in [(100_000, 0), (0, 100_000), (50_000, 50_000)]:
        assert math.isfinite(stats.log_e_value(wins, losses))
        low, high = stats.confidence_set(wins, losses)
        assert 0 <= low < high <= 1 and low <= wins / 100_000 <= high
    assert stats.confidence_set(0, 0) == (0.0, 1.0)
    assert stats.anytime_p([]) == 1.0 and stats.anytime_p([-3.0]) == 1.0
    assert stats.anytime_p([0.1, math.log(40), 1.0]) == pytest.approx(1 / 40)


def test_confidence_set_fixture_and_a_search_by_hand():
    low, high = stats.confidence_set(120, 80)
    assert (round(float(low), 3), round(float(high), 3)) == (0.494, 0.700)
    for wins, losses in [(1, 0), (3, 9), (40, 60)]:
        inside = [
            t for t in np.linspace(0.0005, 0.9995, 1000) if stats.log_e_value(wins, losses, theta=t) < math.log(20)
        ]
        low, high = stats.confidence_set(wins, losses)
        assert low == pytest.approx(inside[0], abs=0.001) and high == pytest.approx(inside[-1], abs=0.001)


def test_confidence_sequences_only_narrow_and_cover_at_all_times():
    rng = np.random.default_rng(12)
    votes = rng.random((400, 300)) < 0.6
    wins = np.cumsum(votes, axis=1)
    losses = np.arange(1, 301) - wins
    low, high = stats.confidence_set(wins, losses)
    missed = ((low > 0.6) | (high < 0.6)).any(axis=1).mean()
    assert missed <= 0.05
    low, high = stats.confidence_sequence(wins[0], losses[0])
    assert (np.diff(low) >= 0).all() and (np.diff(high) <= 0).all()


def test_query_e_values_reduce_to_the_formula():
    rng = np.random.default_rng(13)
    scores = rng.choice([-1.0, 0, 1], size=700, p=[0.3, 0.2, 0.5])
    wins, losses = np.cumsum(scores == 1), np.cumsum(scores == -1)
    assert stats.query_log_e(scores) == pytest.approx(stats.log_e_value(wins, losses), abs=1e-8)
    assert stats.query_log_e([0.0]) == pytest.approx([0.0])
    assert np.isfinite(stats.query_log_e(np.ones(100_000))).all()
    assert stats.query_log_e([]).shape == (0,)
    with pytest.raises(ValueError, match="-1, 1"):
        stats.query_log_e([1.2])


def test_query_e_values_against_the_integral(monkeypatch):
    rng = np.random.default_rng(14)
    scores = rng.choice([-1, -0.6, -0.2, 0.2, 0.6, 1], size=(3, 40))
    path = stats.query_log_e(scores)
    for row, count in itertools.product(range(3), [1, 7, 40]):
        mixture, _ = integrate.quad(
            lambda q, s=scores[row, :count]: scipy_stats.beta.pdf(q, 10, 10) * np.prod(1 + (2 * q - 1) * s), 0, 1
        )
        assert math.exp(path[row, count - 1]) == pytest.approx(mixture, rel=1e-7)
    monkeypatch.setattr(stats, "BLOCK", 1_000)
    assert stats.query_log_e(scores) == pytest.approx(path)


def test_query_confidence_sequence_reduces_to_the_votes_one():
    rng = np.random.default_rng(15)
    scores = rng.choice([-1.0, 1], size=250, p=[0.4, 0.6])
    wins = np.cumsum(scores == 1)
    looks = np.arange(1, 251)
    low, high = stats.query_confidence_sequence(scores, looks)
    their_low, their_high = stats.confidence_sequence(wins, looks - wins)
    assert (1 + low) / 2 == pytest.approx(their_low, abs=1e-6) and (1 + high) / 2 == pytest.approx(their_high, abs=1e-6)
    low, high = stats.query_confidence_sequence([], [0])
    assert (low[0], high[0]) == pytest.approx((-1, 1))


def test_query_confidence_sequence_agrees_with_the_e_value_and_covers():
    rng = np.random.default_rng(16)
    missed = 0
    for _ in range(100):
        latent = rng.beta(3, 2, size=120)
        scores = 2 * rng.binomial(5, latent) / 5 - 1
        low, high = stats.query_confidence_sequence(scores, np.arange(0, 121, 10))
        missed += low[-1] > 0.2 or high[-1] < 0.2  # the mean of 2 * Beta(3, 2) - 1
        crossed = (stats.query_log_e(scores)[9::10] >= math.log(20)).any()
        assert crossed == (low[-1] > 0 or high[-1] < 0)
    assert missed <= 5


# Alarms when somebody looks after every query: the reason for the e-value.


def test_null_experiments_looked_at_after_every_vote():
    rng = np.random.default_rng(17)
    wins = np.cumsum(rng.random((2000, 500)) < 0.5, axis=1)
    n = np.arange(1, 501)
    alarms = (stats.log_e_value(wins, n - wins) >= math.log(20)).any(axis=1).mean()
    assert alarms <= 0.05
    edge = scipy_stats.binom.ppf(0.025, n, 0.5)  # reject below it: P(X < edge) <= 0.025
    naive = (np.minimum(wins, n - wins) < edge).any(axis=1).mean()
    assert 0.31 <= naive <= 0.41  # the plain binomial, looked at after every vote


def test_null_experiments_with_five_judges_who_agree():
    rng = np.random.default_rng(18)
    queries = 100
    latent = rng.beta(0.5, 0.5, size=(2000, queries, 1))  # on most pictures nearly all judges see it the same way
    won = (rng.random((2000, queries, 5)) < latent).sum(axis=2)
    assert (stats.query_log_e(2 * won / 5 - 1) >= math.log(20)).any(axis=1).mean() <= 0.05
    wins, n = np.cumsum(won, axis=1), 5 * np.arange(1, queries + 1)
    as_if_independent = (stats.log_e_value(wins, n - wins) >= math.log(20)).any(axis=1).mean()
    assert as_if_independent >= 0.25  # what counting the judges as independent would do
    p = [stats.sign_flip_test(2 * row / 5 - 1) for row in won[:1000, :50]]
    assert np.mean(np.array(p) <= 0.05) <= 0.06


def test_the_e_value_finds_what_is_there():
    rng = np.random.default_rng(19)
    wins = np.cumsum(rng.random((500, 300)) < 0.65, axis=1)
    found = (stats.log_e_value(wins, np.arange(1, 301) - wins) >= math.log(20)).any(axis=1).mean()
    assert found >= 0.95


# --------------------------------------------------------------------------------------------------------------------
# Position


def test_a_judge_of_the_top_row_fires_the_position_test_and_not_the_preference():
    rng = np.random.default_rng(20)
    position = preference = adjusted = 0
    for _ in range(2000):
        left = rng.choice([-1, 1], size=200)
        won = np.where(rng.random(200) < 0.8, left, -left)
        result = stats.position_statistics(won, left, range(200))
        position += result["p"] <= 0.05
        adjusted += result["adjusted_p"] <= 0.05
        preference += stats.binomial_test(int((won > 0).sum()), 200) <= 0.05
    assert position == 2000
    assert preference / 2000 <= 0.06 and adjusted / 2000 <= 0.06


def test_adjusted_preference_with_judges_who_agree():
    rng = np.random.default_rng(21)
    alarms = covered = 0
    for _ in range(500):
        latent = np.repeat(rng.choice([0.1, 0.9], size=60), 5)
        left = rng.choice([-1, 1], size=300)
        won = np.where(rng.random(300) < 0.5, left, np.where(rng.random(300) < latent, 1, -1))
        result = stats.position_statistics(won, left, np.repeat(np.arange(60), 5))
        alarms += result["adjusted_p"] <= 0.05
        covered += result["adjusted_low"] <= 0.5 <= result["adjusted_high"]
    assert alarms / 500 <= 0.08 and covered / 500 >= 0.92


def test_adjusted_preference_corrects_an_unfair_coin():
    rng = np.random.default_rng(22)
    left = np.where(rng.random(4000) < 0.7, 1, -1)  # the challenger stood on top too often
    top = rng.random(4000) < 0.6
    won = np.where(top, left, np.where(rng.random(4000) < 0.7, 1, -1))
    result = stats.position_statistics(won, left, range(4000))
    assert (won > 0).mean() > 0.68  # 0.7 x (0.6 + 0.4 x 0.7) + 0.3 x (0.4 x 0.7)
    assert result["adjusted"] == pytest.approx(0.58, abs=0.03)  # 0.6 x 0.5 + 0.4 x 0.7
    assert result["adjusted_low"] < 0.58 < result["adjusted_high"]


def test_position_against_scipy():
    won, left = np.repeat([1, -1, 1, -1], [40, 20, 31, 29]), np.repeat([1, 1, -1, -1], [40, 20, 31, 29])
    result = stats.position_statistics(won, left, range(120))
    assert (result["wins_as_a"], result["wins_as_b"]) == pytest.approx((40 / 60, 31 / 60))
    assert result["chose_a"] == 40 + 29
    assert result["p"] == pytest.approx(scipy_stats.binomtest(69, 120).pvalue)
    table = [[40, 20], [29, 31]]  # A and B chosen, by the challenger's side
    assert result["adjusted_p"] == pytest.approx(scipy_stats.chi2_contingency(table, correction=False).pvalue)
    assert result["adjusted"] == pytest.approx((40 / 60 + 31 / 60) / 2)


def test_position_edges():
    assert stats.position_statistics([], [], [])["adjusted"] is None
    assert stats.position_statistics([1, 1], [1, 1], "ab")["adjusted"] is None
    result = stats.position_statistics([1, 1, 1, 1], [1, 1, -1, -1], "abcd")
    assert result["adjusted"] == 1 and result["adjusted_low"] < 1 and result["adjusted_high"] == 1


# --------------------------------------------------------------------------------------------------------------------
# Categories


def test_categories_correct_only_what_was_tested():
    scores = [1.0] * 18 + [-1.0] * 2 + [1.0] * 5 + [1.0] * 12 + [-1.0] * 12
    categories = ["bed"] * 20 + ["desk"] * 5 + ["sofa"] * 24
    votes = [Counter(win=1) if score > 0 else Counter(loss=1) for score in scores]
    bed, desk, sofa = stats.category_statistics(scores, votes, categories)
    assert bed["p"] == pytest.approx(scipy_stats.binomtest(18, 20).pvalue) and bed["p_holm"] == pytest.approx(
        2 * bed["p"]
    )
    assert (desk["p"], desk["p_holm"], desk["net"], desk["votes"]) == (None, None, 1.0, 5)
    assert sofa["p"] == 1.0 and (sofa["wins"], sofa["losses"], sofa["ties"]) == (12, 12, 0)
    assert stats.category_statistics([], [], []) == []


def test_heterogeneity_holds_its_level_and_finds_a_split():
    rng = np.random.default_rng(23)
    alarms = 0
    for case in range(300):
        categories = rng.choice(list("abcdef"), size=80, p=[0.5, 0.3, 0.1, 0.05, 0.03, 0.02])
        alarms += stats.heterogeneity_test(rng.choice([-1, 0, 1], size=80), categories, draws=199, seed=case) <= 0.05
    assert alarms / 300 <= 0.08
    split = [1.0] * 30 + [-1.0] * 30
    assert stats.heterogeneity_test(split, ["a"] * 30 + ["b"] * 30) < 0.001
    assert stats.heterogeneity_test([1.0, -1.0], ["a", "a"]) == stats.heterogeneity_test([], []) == 1.0


def test_heterogeneity_near_the_chi_square_for_large_categories():
    scores = np.repeat([1.0, -1.0, 1.0, -1.0], [70, 50, 50, 60])
    categories = ["a"] * 120 + ["b"] * 110
    theirs = scipy_stats.chi2_contingency([[70, 50], [50, 60]], correction=False).pvalue
    assert stats.heterogeneity_test(scores, categories) == pytest.approx(theirs, abs=0.03)


# --------------------------------------------------------------------------------------------------------------------
# Agreement


def test_krippendorff_on_the_example_of_its_author():
    judges = ["123321412...", "1233224125.3", ".33323422 51.".replace(" ", ""), "12332441251."]  # columns are units
    units = [[judge[unit] for judge in judges if judge[unit] != "."] for unit in range(12)]
    result = stats.krippendorff_alpha(units)
    assert result["alpha"] == pytest.approx(0.743, abs=0.0005)
    assert (result["units"], result["labels"]) == (11, 40)
    assert result["low"] < 0.743 < result["high"]


def test_krippendorff_by_the_coincidence_matrix():
    rng = np.random.default_rng(24)
    units = [rng.choice(["base", "tie", "new"], size=rng.integers(1, 5)).tolist() for _ in range(50)]
    coincidence: Counter = Counter()
    for unit in units:
        for one, other in itertools.permutations(range(len(unit)), 2):
            coincidence[unit[one], unit[other]] += 1 / (len(unit) - 1)
    total: Counter = Counter()
    for (one, _), weight in coincidence.items():
        total[one] += weight
    n = sum(total.values())
    observed = sum(weight for (one, other), weight in coincidence.items() if one != other)
    expected = sum(total[x] * total[y] for x in total for y in total if x != y) / (n - 1)
    result = stats.krippendorff_alpha(units)
    assert result["alpha"] == pytest.approx(1 - observed / expected)
    assert result["agreement"] == pytest.approx(1 - observed / n)


def test_krippendorff_edges():
    assert stats.krippendorff_alpha([])["alpha"] is None
    assert stats.krippendorff_alpha([["a"], ["b"]])["agreement"] is None
    same = stats.krippendorff_alpha([["a", "a"], ["a", "a"]])
    assert same["alpha"] is None and same["agreement"] == 1.0
    assert stats.krippendorff_alpha([["a", "a"], ["b", "b"]])["alpha"] == 1.0


# --------------------------------------------------------------------------------------------------------------------
# Votes needed, ranking


def test_votes_needed_by_exact_power():
    assert [stats.votes_needed(rate) for rate in (0.55, 0.60, 0.65)] == [820, 210, 97]
    assert stats.votes_needed(0.35) == 97

    def power(n, rate):  # by hand: every outcome that the exact test rejects
        rejects = [k for k in range(n + 1) if scipy_stats.binom.cdf(min(k, n - k), n, 0.5) * 2 <= 0.05]
        return scipy_stats.binom.pmf(rejects, n, rate).sum()

    assert power(96, 0.65) < 0.8 and all(power(n, 0.65) >= 0.8 for n in range(97, 130))
    for rate in (0.5, 0.505, 1.0):
        with pytest.raises(ValueError, match="win rate"):
            stats.votes_needed(rate)


def test_bradley_terry_against_maximum_likelihood():
    rng = np.random.default_rng(25)
    truth = np.array([0.0, 0.5, 1.0, -0.5])
    wins = np.zeros((4, 4))
    for i, j in itertools.combinations(range(4), 2):
        wins[i, j] = rng.binomial(60, 1 / (1 + np.exp(truth[j] - truth[i])))
        wins[j, i] = 60 - wins[i, j]

    def loss(beta):
        games = sum(wins[i, j] * np.log1p(np.exp(beta[j] - beta[i])) for i in range(4) for j in range(4) if i != j)
        return games + sum(0.5 * np.log1p(np.exp(-b)) + 0.5 * np.log1p(np.exp(b)) for b in beta)

    best = optimize.minimize(loss, np.zeros(4), tol=1e-12).x
    assert stats.bradley_terry(wins) == pytest.approx(best - best.mean(), abs=1e-4)
    assert stats.bradley_terry(np.stack([wins, wins.T]))[1] == pytest.approx(-stats.bradley_terry(wins), abs=1e-6)


def test_bradley_terry_is_finite_when_one_model_wins_everything_or_none_met():
    wins = np.zeros((4, 4))
    wins[0, 1] = wins[2, 3] = 50
    strength = stats.bradley_terry(wins)
    assert np.isfinite(strength).all() and strength[0] > strength[1] and strength[0] == pytest.approx(strength[2])
    assert stats.bradley_terry(np.zeros((3, 3))) == pytest.approx([0, 0, 0])


def test_ranking_with_intervals():
    rng = np.random.default_rng(26)
    truth = {"zero_shot": -0.5, "dual_lora": 0.7, "text_lora": 0.0}
    games = []
    for query in range(300):
        one, other = rng.permutation(list(truth))[:2]
        up = rng.random() < 1 / (1 + math.exp(truth[other] - truth[one]))
        games.append((query, one, other, 1.0) if up else (query, other, one, 1.0))
    ranking = stats.rank_models(games, sorted(truth))
    assert [row["model"] for row in ranking] == ["dual_lora", "text_lora", "zero_shot"]
    for row in ranking:
        assert row["low"] < row["strength"] < row["high"]
        assert row["low"] <= truth[row["model"]] - np.mean(list(truth.values())) <= row["high"]
    assert ranking[0]["first"] > 0.95 and sum(row["first"] for row in ranking) == pytest.approx(1)
    assert sum(row["votes"] for row in ranking) == 600
    assert stats.rank_models([], ["a", "b"]) == []


# --------------------------------------------------------------------------------------------------------------------
# What the rows held


def test_results_distribution():
    lists = [("abcd", "abcd"), ("abcd", "bacd"), ("abcd", "abxy"), ("abcd", "wxyz")]
    result = stats.results_distribution(lists)
    assert result["overlap"] == {"0": 1, "1": 0, "2": 1, "3": 0, "4": 2}
    assert result["mean_overlap"] == 2.5 and result["same_set"] == 1 and result["k"] == 4
    assert result["differs"] == [0.5, 0.5, 0.5, 0.5]
    assert stats.results_distribution([])["mean_overlap"] is None


def test_attribute_agreement_of_won_and_lost_rows():
    won = [{"color": 1.0, "style": None}, {"color": 0.5, "style": 0.25}]
    lost = [{"color": 0.5, "style": 1.0}, {"color": 0.25, "style": 0.5}]
    color, style = stats.attribute_agreement(won, lost, ["q1", "q2"])
    assert (color["attribute"], color["won"], color["lost"], color["difference"]) == ("color", 0.75, 0.375, 0.375)
    assert (style["votes"], style["difference"], style["low"]) == (1, -0.25, None)
    assert stats.attribute_agreement([], [], []) == []


# --------------------------------------------------------------------------------------------------------------------
# The results page


def _vote(number, choice, query=None, judge="ann", left="tuned", **more):
    right = "base" if left == "tuned" else "tuned"
    row = {"trial": f"t{number}", "judge": judge, "query": query or f"q{number}", "category": "sofa", "choice": choice}
    row |= {"left": left, "right": right, "base": "base", "items": {"base": list("abcd"), "tuned": list("abxy")}}
    return row | {"time": 1000 + number} | more


def _log(wins, losses, ties=0):
    """Votes with these counts, as evenly mixed as can be, on alternating sides."""
    kinds = [("win", wins), ("loss", losses), ("tie", ties)]
    spread = sorted(((i + 0.5) / count, kind) for kind, count in kinds for i in range(count))
    log = []
    for number, (_, kind) in enumerate(spread):
        left = ("tuned", "base")[number % 2]
        win, loss = ("A", "B") if left == "tuned" else ("B", "A")
        log.append(_vote(number, {"win": win, "loss": loss, "tie": "T"}[kind], left=left))
    return log


def _pair(votes):
    result = stats.arena_statistics(votes)
    json.dumps(result, allow_nan=False)
    assert len(result["pairs"]) == 1
    return result["pairs"][0]


def test_the_fixture_reads_not_yet():
    pair = _pair(_log(120, 80, 25))
    assert pair["counts"]["votes"] == pair["counts"]["queries"] == 225
    assert pair["planned"]["p"] == pair["planned"]["p_holm"] == pytest.approx(0.0057, abs=5e-5)
    assert pair["planned"]["p_binomial"] == pytest.approx(pair["planned"]["p"]) and pair["planned"]["independent"]
    assert (round(pair["win_rate"]["low"], 3), round(pair["win_rate"]["high"], 3)) == (0.531, 0.665)
    assert pair["anytime"]["e"] == pytest.approx(11.74, abs=0.005)
    assert pair["anytime"]["p"] == pytest.approx(1 / pair["anytime"]["max_e"])
    assert pair["anytime"]["win_low"] >= 0.493 and pair["anytime"]["win_high"] <= 0.701
    assert pair["verdict"]["answer"] == "not yet" and pair["verdict"]["sentence"].startswith("Not yet")
    assert pair["tie_rate"]["value"] == pytest.approx(25 / 225)
    assert pair["net"]["value"] == pytest.approx(40 / 225) and pair["net"]["low"] > 0
    assert [row["missing"] for row in pair["needed"]] == [620, 10, 0]


@pytest.mark.parametrize(
    ("wins", "losses", "answer"),
    [(0, 0, "no votes"), (20, 18, "no difference shown"), (70, 20, "tuned"), (20, 70, "base"), (65, 35, "not yet")],
)
def test_verdicts(wins, losses, answer):
    log = _log(wins, losses) or [_vote(0, "N")]
    assert _pair(log)["verdict"]["answer"] == answer


def test_every_row_is_counted_once_with_its_reason():
    log = [
        _vote(0, "A"),
        _vote(1, "N"),
        _vote(2, "B", revoked=True),
        _vote(3, "B", query="q2"),
        _vote(4, None, identical=True),
        _vote(5, "B", query="q0", left="base"),  # the same judge again, sides exchanged, same model
        _vote(6, "T"),
    ]
    result = stats.arena_statistics(log)
    assert result["votes"]["excluded"] == {"undone": 1, "identical": 1, "abstained": 1, "repeat": 1}
    assert result["votes"]["counted"] == 3 and result["votes"]["rows"] == 7 and result["votes"]["judges"] == 1
    pair = result["pairs"][0]
    assert (pair["counts"]["wins"], pair["counts"]["losses"], pair["counts"]["ties"]) == (1, 1, 1)
    assert pair["counts"]["abstained"] == 1 and pair["tie_rate"]["value"] == pytest.approx(1 / 3)
    assert pair["identical"] == {"queries": 1, "share": 0.25}
    assert pair["consistency"] == {"repeats": 1, "same_model": 1.0, "same_row": 0.0}
    row = {"judge": "ann", "votes": 3, "ties": 1, "abstained": 1, "repeats": 1, "share_a": 0.5}
    assert result["judges"] == [row]
    assert stats.arena_statistics([])["pairs"] == []


def test_a_first_answer_that_abstained_leaves_the_second_to_count():
    pair = _pair([_vote(0, "N", query="q"), _vote(1, "A", query="q")])
    assert pair["counts"]["votes"] == 1 and pair["consistency"]["repeats"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choice": "C"}, "unknown choice 'C'"),
        ({"choice": "a"}, "unknown choice 'a'"),
        ({"choice": None}, "unknown choice None"),
        ({"left": "base", "right": "base"}, "shows 'base' and 'base'"),
        ({"base": "other"}, "with base 'other'"),
        ({"items": {"base": []}}, "has items of"),
        ({"trial": "t0"}, "comes twice"),
        ({"base": "tuned"}, "each the base of the other"),
    ],
)
def test_bad_rows_raise(change, message):
    with pytest.raises(ValueError, match=message):
        stats.arena_statistics([_vote(0, "A"), _vote(1, "A") | change])
    with pytest.raises(ValueError, match="lacks base, judge"):
        stats.arena_statistics([{k: v for k, v in _vote(0, "A").items() if k not in ("judge", "base")}])


def test_the_unit_is_the_query():
    copies = [  # five judges who always agree are worth one
        vote | {"trial": f"{vote['trial']}-{judge}", "judge": judge, "judges": 5}
        for vote in _log(30, 18)
        for judge in "vwxyz"
    ]
    once, five = _pair(_log(30, 18)), _pair(copies)
    for part in ("planned", "anytime"):
        assert five[part]["p"] == pytest.approx(once[part]["p"])
    assert (five["net"]["low"], five["net"]["high"]) == pytest.approx((once["net"]["low"], once["net"]["high"]))
    assert five["planned"]["p_binomial"] < 0.01 < once["planned"]["p_binomial"] and not five["planned"]["independent"]
    assert five["anytime"]["closed"] == 48 and five["agreement"]["alpha"] == 1.0
    assert five["position"]["design_effect"] == pytest.approx(5)
    for rate in ("win_rate", "tie_rate"):
        assert (five[rate]["low"], five[rate]["high"]) == pytest.approx((once[rate]["low"], once[rate]["high"]))


def test_queries_close_by_schedule_and_never_by_outcome():
    rng = np.random.default_rng(27)
    schedule = [(f"q{rng.integers(0, 60)}", f"j{number}") for number in range(200)]
    courses = set()
    for _ in range(5):
        log = [_vote(n, rng.choice(list("ABT")), query=q, judge=j, judges=3) for n, (q, j) in enumerate(schedule)]
        closed, waiting = stats.closed_scores(log)
        courses.add((tuple(when for _, when in closed), waiting))
    assert len(courses) == 1
    one_judge = [_vote(n, "A", judges=3) for n in range(50)]
    closed, waiting = stats.closed_scores(one_judge)  # the other judges never come: patience closes them
    assert (len(closed), waiting) == (50 - stats.PATIENCE, stats.PATIENCE)
    closed, waiting = stats.closed_scores([_vote(0, "A", query="q"), _vote(1, "B", query="q", judge="bob")])
    assert closed == [(1.0, 1)] and waiting == 0  # planned for one judge: a second one comes too late to bet on
    closed, waiting = stats.closed_scores(
        [_vote(n, "N") for n in range(50)] + [_vote(50, "B", query="q7", judge="bob")]
    )
    assert (closed, waiting) == ([(-1.0, 1)], 49)  # a query on which all abstained waits for somebody who votes


def test_null_logs_that_go_through_the_schedule():
    """2,000 logs as people make them: five judges a query who agree, come late, abstain or never come."""
    rng = np.random.default_rng(28)
    alarms, forced = 0, 0
    for _ in range(2000):
        begun = np.repeat(np.arange(40.0), 5) + rng.exponential(8, size=200)  # of some a judge is still to come
        chance = np.repeat(rng.choice([0.1, 0.9], size=40), 5)
        chosen = np.where(rng.random(200) < 0.05, "N", np.where(rng.random(200) < chance, "A", "B"))
        order = [n for n in np.argsort(begun) if rng.random() < 0.9]
        log = [_vote(n, chosen[n], query=f"q{n // 5}", judges=5) for n in order]
        closed, _ = stats.closed_scores(log)
        forced += len(closed) > sum(count == 5 for count in Counter(vote["query"] for vote in log).values())
        log_e = stats.query_log_e([score for score, _ in closed])
        alarms += bool((log_e >= math.log(20)).any())  # E changes only where a query closes
    assert alarms / 2000 <= 0.05 and forced > 1000  # and many were closed by patience, without all their judges


def test_series_for_the_plots():
    log = [*_log(300, 200, 100), _vote(1000, "N")]
    series = _pair(log)["series"]
    votes = series["votes"]
    assert votes["n"][0] == 0 and votes["n"][-1] == 600 and len(votes["n"]) == stats.LOOKS
    assert (votes["wins"][-1], votes["losses"][-1], votes["ties"][-1]) == (300, 200, 100)
    assert all(
        sum(counts) == n for *counts, n in zip(votes["wins"], votes["losses"], votes["ties"], votes["n"], strict=True)
    )
    assert votes["time"][0] is None and votes["time"][-1] == 1599
    assert series["e"]["log10_e"][-1] == pytest.approx(stats.log_e_value(300, 200) / math.log(10))
    assert series["win_rate"]["n"][-1] == 500 and series["win_rate"]["value"][-1] == 0.6
    for name, keys in [("e", ("net_low", "net_high")), ("win_rate", ("low", "high"))]:
        low, high = (np.array(series[name][key]) for key in keys)
        assert (np.diff(low) >= 0).all() and (np.diff(high) <= 0).all() and (low <= high).all()
        assert len(low) == len(series[name].get("queries") or series[name]["n"])


def test_several_models_are_ranked_and_pairs_kept_apart():
    rng = np.random.default_rng(28)
    log = []
    for number in range(150):
        one, other = sorted(rng.choice(["a", "b", "c"], size=2, replace=False))
        row = _vote(number, "A" if rng.random() < 0.8 else "B", query=f"q{number // 3}", judge=f"j{number % 3}")
        log.append(row | {"left": one, "right": other, "base": other, "items": {one: [1], other: [2]}})
    result = stats.arena_statistics(log)
    assert [(pair["challenger"], pair["base"]) for pair in result["pairs"]] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert sum(pair["counts"]["votes"] for pair in result["pairs"]) == 150
    assert [row["model"] for row in result["ranking"]] == ["a", "b", "c"]
    for part in ("planned", "anytime"):
        corrected = stats.holm([pair[part]["p"] for pair in result["pairs"]])
        assert [pair[part]["p_holm"] for pair in result["pairs"]] == corrected
    assert all("corrected for 3 pairs" in pair["verdict"]["sentence"] for pair in result["pairs"])
    for pair in result["pairs"]:
        assert (pair["verdict"]["answer"] == pair["challenger"]) == (pair["anytime"]["p_holm"] <= 0.05)
    json.dumps(result, allow_nan=False)


def test_the_same_log_gives_the_same_page():
    log = _log(30, 20, 5)
    assert stats.arena_statistics(log) == stats.arena_statistics(log)
