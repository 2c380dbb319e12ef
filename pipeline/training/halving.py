"""Successive halving over a logarithmic grid of learning rates, seed by seed.

Every rate of the grid trains with the first seed; the better half goes on with the second, the better half of
those with the third. Each run is a whole one: the best rate depends on how long one trains, so no rate is judged
by a shortened run. Source: Jamieson, Talwalkar 2016, "Non-stochastic Best Arm Identification", arXiv 1502.07943.
"""

import math
import statistics
from collections.abc import Callable, Generator, Mapping, Sequence

STEPS = (1.0, 2.0, 5.0)
"""The rates of a decade."""

Scores = dict[float, list[float]]
Runs = list[tuple[float, int]]


def halving(start: float, reach: int, seeds: Sequence[int], score: Callable[[float, int], float]) -> Scores:
    """Search a rate.

    Where the best of the first rung stands at an end of the grid, the grid grows there, until the score falls or
    stays the same.

    Args:
        start: the middle of the grid, which takes its nearest value.
        reach: grid values on either side of it.
        seeds: one a rung.
        score: (rate, seed) -> score, the higher the better; -inf for a run that diverged.

    Returns:
        rate -> its scores, one for each rung that it took part in.
    """
    search = rungs(start, reach, seeds)
    asked = next(search)
    while True:
        try:
            asked = search.send([score(*run) for run in asked])
        except StopIteration as end:
            tried: Scores = end.value
            return tried


def rungs(start: float, reach: int, seeds: Sequence[int]) -> Generator[Runs, Sequence[float], Scores]:
    """The search of ``halving``, for who makes the runs himself, several at once perhaps.

    Args:
        start: as in ``halving``.
        reach: likewise.
        seeds: likewise.

    Yields:
        The (rate, seed) pairs to run next; send their scores, in that order.

    Returns:
        As ``halving``.
    """
    alive = [grid(start, move) for move in range(-reach, reach + 1)]
    scores = yield [(rate, seeds[0]) for rate in alive]
    tried: Scores = {rate: [score] for rate, score in zip(alive, scores, strict=True)}
    while (beyond := _beyond(tried)) is not None:
        tried[beyond] = list((yield [(beyond, seeds[0])]))
    for seed in seeds[1:]:
        alive = _best_half(tried)
        scores = yield [(rate, seed) for rate in alive]
        for rate, score in zip(alive, scores, strict=True):
            tried[rate].append(score)
    return dict(sorted(tried.items()))


def best_rate(tried: Mapping[float, Sequence[float]]) -> float:
    """Choose the rate that the search stands for: the middle of a maximum rather than its edge.

    Past the best rates scores fall off a cliff, and a reported run, of other seeds and more steps than those of
    the search, may lie beyond it. So a rate is judged by its mean score and its two neighbours' on the grid,
    weighted 2 : 1 : 1; a neighbour that was not tried, or diverged, counts as the lowest score there is.

    Args:
        tried: rate -> its scores, from a search.

    Returns:
        The best of the rates with the most seeds; the lower one where two are equal.
    """
    means = {rate: _mean(scores) for rate, scores in tried.items()}
    lowest = min((mean for mean in means.values() if math.isfinite(mean)), default=0.0)

    def judged(rate: float) -> float:
        beside = [max(means.get(grid(rate, move), lowest), lowest) for move in (-1, 1)]
        return round(2 * means[rate] + sum(beside), 9)

    return max(_finalists(tried), key=judged)


def grid(rate: float, move: int) -> float:
    """The rate of the 1-2-5 grid nearest to ``rate``, or its ``move``-th neighbour."""
    count = len(STEPS)
    places = range(-12 * count, 4 * count)
    value = {place: STEPS[place % count] * 10.0 ** (place // count) for place in places}
    nearest = min(places, key=lambda place: abs(math.log(value[place] / rate)))
    return float(f"{value[nearest + move]:.0e}")


def _best_half(tried: Scores) -> list[float]:
    """The better half of the last rung, rounded up, at least two where there are two."""
    last = _finalists(tried)
    ranked = sorted(last, key=lambda rate: -_mean(tried[rate]))
    return sorted(ranked[: max(min(2, len(last)), math.ceil(len(last) / 2))])


def _beyond(tried: Scores) -> float | None:
    """The rate past the end at which the best stands; None where it stands inside, or on a plateau."""
    peak = max(_finalists(tried), key=lambda rate: _mean(tried[rate]))
    for move in (1, -1):
        beyond, behind = grid(peak, move), grid(peak, -move)
        if beyond not in tried and tried.get(behind) != tried[peak]:
            return beyond
    return None


def _finalists(tried: Mapping[float, Sequence[float]]) -> list[float]:
    """The rates with the most seeds, ascending."""
    longest = max(len(scores) for scores in tried.values())
    return [rate for rate in sorted(tried) if len(tried[rate]) == longest]


def _mean(scores: Sequence[float]) -> float:
    """The mean without its last digits, so that 281 + 280 right answers are as good as 282 + 279."""
    return round(statistics.mean(scores), 9)
