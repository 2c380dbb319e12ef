"""Learning-rate schedules: the factor on the peak learning rate at each optimizer step."""

import math
from collections.abc import Callable

from pipeline.errors import ParamsError

Schedule = Callable[[int], float]


def linear(total: int, warmup: float) -> Schedule:
    """Rise from 0 over W = ceil(warmup · total) steps, then fall linearly to 0 at ``total``.

    f(s) = s / W for s < W, else (total - s) / (total - W). The first of several warmup steps has factor 0, as in
    ``transformers.get_linear_schedule_with_warmup``.

    Returns:
        The schedule.
    """
    rising = math.ceil(warmup * total)

    def factor(step: int) -> float:
        if step < rising:
            return step / max(1, rising)
        return max(0.0, (total - step) / max(1, total - rising))

    return factor


def piecewise(total: int, warmup: float) -> Schedule:
    """Rise from 0 to 1 at the point w = warmup · total, then fall linearly to 0 at ``total``.

    f(s) = s / w for s < w, else (total - s) / (total - w): the triangle of the fast CIFAR-10 recipes. Unlike
    ``linear``, the peak may lie between two steps.

    Returns:
        The schedule.
    """
    peak = warmup * total

    def factor(step: int) -> float:
        if step < peak:
            return step / peak
        return max(0.0, (total - step) / (total - peak)) if total > peak else 1.0

    return factor


def constant(total: int, warmup: float) -> Schedule:
    """Rise from 0 as ``linear`` does, then stay at 1.

    Returns:
        The schedule.
    """
    rising = math.ceil(warmup * total)
    return lambda step: step / rising if step < rising else 1.0


SCHEDULES: dict[str, Callable[[int, float], Schedule]] = {
    "linear": linear,
    "piecewise": piecewise,
    "constant": constant,
}


def make_schedule(kind: str, total: int, warmup: float = 0.0) -> Schedule:
    """Make a schedule by its name in params.yaml.

    Args:
        kind: ``linear``, ``piecewise`` or ``constant``.
        total: optimizer steps of the whole run.
        warmup: fraction of the steps in [0, 1] over which the rate rises.

    Returns:
        A function: step in 0..total-1 -> factor in [0, 1] on the peak learning rate.

    Raises:
        ParamsError: if the kind is unknown, or the warmup no fraction.
    """
    if kind not in SCHEDULES:
        raise ParamsError(f"schedule '{kind}' is unknown; choose one of {', '.join(SCHEDULES)}")
    if not 0.0 <= warmup <= 1.0:
        raise ParamsError(f"warmup is {warmup}; expected a fraction of the steps between 0 and 1")
    return SCHEDULES[kind](total, warmup)
