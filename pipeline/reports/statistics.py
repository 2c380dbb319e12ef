"""Mean, spread and paired differences of a few seeds."""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

_EXACT = 5  # up to n = 5 all n^n resamples are enumerated; above, drawn with a fixed seed
_RESAMPLES = 10_000
_LEVEL = 0.95
_ROUNDING = 1e-12  # differences of equal scores differ by rounding: no spread to test with


def mean(values: Sequence[float]) -> float | None:
    """The arithmetic mean; None for no values."""
    return math.fsum(values) / len(values) if values else None


def spread(values: Sequence[float]) -> float | None:
    """The sample standard deviation sqrt(Σ (x - mean)² / (n - 1)); None for fewer than two values."""
    centre = mean(values)
    if centre is None or len(values) < 2:
        return None
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % percentile bootstrap interval of the mean.

    Up to five values every one of the n^n resamples is taken; above, 10,000 drawn with a fixed seed. With three
    values each extreme resample has weight 1/27 > 2.5 %, so that the interval is their range.

    Args:
        values: paired differences.

    Returns:
        Lower and upper end; None for fewer than two values.
    """
    n = len(values)
    if n < 2:
        return None
    if n <= _EXACT:
        means = np.array([math.fsum(picked) / n for picked in itertools.product(values, repeat=n)])
    else:
        picks = np.random.default_rng(0).integers(0, n, size=(_RESAMPLES, n))
        means = np.asarray(values, dtype=np.float64)[picks].mean(axis=1)
    ends = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], method="inverted_cdf")
    return float(ends[0]), float(ends[1])


def paired_p(values: Sequence[float]) -> float | None:
    """The two-sided p of the paired t-test, t = mean / (s / sqrt n) with n - 1 degrees of freedom.

    Args:
        values: paired differences.

    Returns:
        p; None for fewer than two values or without any spread.
    """
    centre, deviation = mean(values), spread(values)
    if centre is None or deviation is None or deviation <= _ROUNDING * abs(centre):
        return None
    from scipy.stats import t  # a second to import, and most reports ask for it once

    return float(2 * t.sf(abs(centre) * math.sqrt(len(values)) / deviation, len(values) - 1))


class Scored:
    """What a cell's scores come to.

    Attributes:
        scores: seed -> score; None for a seed that diverged.
    """

    scores: Mapping[int, float | None]

    @property
    def values(self) -> list[float]:
        """The scores there are, in the order of the seeds."""
        return [score for score in self.scores.values() if score is not None]

    @property
    def mean(self) -> float | None:
        """Mean score over the seeds that have one."""
        return mean(self.values)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over the same seeds; None for fewer than two."""
        return spread(self.values)
