"""Statistics against numbers worked out by hand and against scipy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipeline.reports.statistics import bootstrap_interval, mean, paired_p, spread

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=8)


def test_mean_and_spread_by_hand():
    assert mean([1.0, 2.0, 6.0]) == 3.0
    assert spread([1.0, 2.0, 6.0]) == pytest.approx(math.sqrt((4 + 1 + 9) / 2))  # n - 1
    assert mean([]) is None and spread([5.0]) is None and spread([]) is None


def test_the_interval_of_three_values_is_their_range():
    assert bootstrap_interval([0.1, -0.2, 0.4]) == pytest.approx((-0.2, 0.4))


def test_the_interval_of_two_values_is_their_range_and_of_one_is_none():
    assert bootstrap_interval([3.0, 1.0]) == (1.0, 3.0)
    assert bootstrap_interval([3.0]) is None


def test_the_interval_of_four_values_by_hand():
    # 256 resamples of 0, 0, 0, 1: the ones are binomial(4, 1/4), so P(0) = .316, P(<=2) = .949, P(<=3) = .996.
    assert bootstrap_interval([0.0, 0.0, 0.0, 1.0]) == (0.0, 0.75)


def test_a_larger_sample_agrees_with_scipys_bootstrap():
    values = np.random.default_rng(3).normal(1.0, 2.0, size=30)
    ours = bootstrap_interval(list(values))
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=7
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.05)
    assert ours == bootstrap_interval(list(values))  # a fixed seed


@given(VALUES)
def test_the_interval_lies_within_the_range_and_turns_with_the_sign(values):
    low, high = bootstrap_interval(values)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    if len(values) <= 5:  # above, resamples are drawn
        assert bootstrap_interval([-v for v in values]) == pytest.approx((-high, -low), abs=1e-9)


@given(
    st.lists(st.floats(-100, 100).map(lambda v: round(v, 3)), min_size=2, max_size=8).filter(
        lambda v: np.ptp(v) > 0
    )
)
def test_p_is_scipys(values):
    assert paired_p(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=1e-6)


def test_p_needs_spread():
    assert paired_p([1.0]) is None and paired_p([2.0, 2.0, 2.0]) is None
    assert paired_p([0.92 - 0.91, 0.93 - 0.92, 0.91 - 0.90]) is None  # equal but for rounding
