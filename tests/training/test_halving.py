"""Successive halving: it finds the peak, spends seeds on the better half only, and ends."""

import math

from hypothesis import given
from hypothesis import strategies as st

from pipeline.training.halving import best_rate, grid, halving


@given(st.floats(-5, 0), st.floats(-5, 0), st.integers(0, 4), st.integers(1, 4))
def test_it_finds_the_peak_wherever_it_starts(start: float, peak: float, reach: int, seeds: int) -> None:
    calls: list[tuple[float, int]] = []

    def score(rate: float, seed: int) -> float:
        calls.append((rate, seed))
        return -abs(math.log10(rate) - peak)

    tried = halving(10**start, reach, range(seeds), score)
    best = best_rate(tried)
    assert best in [grid(10**peak, move) for move in (-1, 0, 1)]
    assert len(tried[best]) == seeds and len(set(calls)) == len(calls) == sum(map(len, tried.values()))
    assert list(tried) == sorted(tried)


def test_each_rung_is_the_better_half_of_the_one_before() -> None:
    seen: dict[int, list[float]] = {}

    def score(rate: float, seed: int) -> float:
        seen.setdefault(seed, []).append(rate)
        return -abs(math.log10(rate) + 3)

    halving(1e-3, 4, [7, 8, 9, 10], score)
    assert [len(rates) for rates in seen.values()] == [9, 5, 3, 2] and list(seen) == [7, 8, 9, 10]
    assert sorted(seen[9]) == [5e-4, 1e-3, 2e-3]


def test_a_later_seed_can_overturn_the_first() -> None:
    scores = {(1e-3, 0): 0.8, (2e-3, 0): 0.9, (1e-3, 1): 0.95, (2e-3, 1): 0.5}
    tried = halving(1e-3, 1, [0, 1], lambda rate, seed: scores.get((rate, seed), 0.0))
    assert best_rate(tried) == 1e-3 and tried[1e-3] == [0.8, 0.95]


def test_on_a_plateau_the_search_ends() -> None:
    assert set(halving(1e-3, 1, [0], lambda *_: 0.5)) == {1e-3, 2e-3, 5e-4}


def test_a_diverged_rate_is_never_the_best_and_a_tie_goes_to_the_lower() -> None:
    assert best_rate({1e-3: [0.8], 1e-2: [-math.inf]}) == 1e-3
    assert best_rate({2e-3: [0.8], 1e-3: [0.8]}) == 1e-3
    assert best_rate({0.5: [282 / 287, 279 / 287], 0.2: [281 / 287, 280 / 287]}) == 0.2


def test_the_middle_of_a_plateau_is_chosen_and_not_its_edge() -> None:
    tried = {1e-3: [0.74, 0.75], 2e-3: [0.77, 0.72], 5e-3: [0.71, 0.80], 1e-2: [0.76, 0.43]}
    assert best_rate(tried) == 2e-3  # 5e-3 has the highest mean, and its neighbour falls
    alone = {2e-3: [0.9, 0.9], 5e-3: [0.89, 0.89], 1e-2: [0.5]}
    assert best_rate(alone) == 2e-3  # 1e-3 was not tried, which is no advantage, but 5e-3 stands beside a fall
    peak = {1e-3: [0.5, 0.5], 2e-3: [0.9, 0.9], 5e-3: [0.6, 0.6]}
    assert best_rate(peak) == 2e-3
    beside = {1e-3: [0.8], 2e-3: [0.81], 5e-3: [-math.inf]}
    assert best_rate(beside) == 2e-3 and best_rate(beside | {2e-4: [0.3], 5e-4: [0.8]}) == 1e-3


def test_the_grid_has_three_rates_a_decade() -> None:
    assert [grid(1e-3, move) for move in range(-2, 3)] == [2e-4, 5e-4, 1e-3, 2e-3, 5e-3]
