"""How many parameters a density stands for, and what the head leaves of them."""

from collections.abc import Sequence
from decimal import ROUND_CEILING, Context, Decimal
from fractions import Fraction

from pipeline.errors import ParamsError
from pipeline.parameters import ParameterIndex


def budget(density: float, total: int) -> int:
    """Count the parameters a density stands for: k = floor(density · n), n = ``total``.

    The density is taken as the decimal number it is written as: 0.29 of 100 is 29, although the binary float
    nearest to 0.29 lies below it and 0.29 * 100 is 28.999999999999996.

    Returns:
        k, between 1 and n.

    Raises:
        ParamsError: if the density is no number in (0, 1], or chooses nothing.
    """
    number = float(density)
    if isinstance(density, bool) or not 0.0 < number <= 1.0:
        raise ParamsError(f"density is {density}; expected a number above 0 and at most 1 (0.005 = 0.5 %)")
    k = int(Fraction(repr(number)) * total)
    if k == 0:
        raise ParamsError(
            f"density {number} of {total} parameters chooses none; the least is {_at_least(1, total)}"
        )
    return k


def _at_least(count: int, total: int) -> str:
    """Write the least density of three digits that chooses ``count`` of ``total``."""
    if count >= total:
        return "1"
    return f"{Context(prec=3, rounding=ROUND_CEILING).divide(Decimal(count), Decimal(max(total, 1))):f}"


def split_budget(index: ParameterIndex, density: float, always: Sequence[str]) -> tuple[list[str], int]:
    """Split the budget of a density into the head, always on, and the rest.

    Args:
        index: the parameters.
        density: chosen / all, head included.
        always: the head's module names, matched module by module.

    Returns:
        The names of the head's tensors, and how many other coordinates may be chosen: k - head.

    Raises:
        ParamsError: if the density is out of range or smaller than the head.
        MismatchError: if a module name matches nothing.
    """  # noqa: DOC502 - raised by what it calls
    head = index.within(always)
    size = sum(index.numel(name) for name in head)
    k = budget(density, index.total)
    if size > k:
        raise ParamsError(
            f"the head ({', '.join(always)}: {size} parameters) is larger than the budget of {k} "
            f"(density {float(density)} of {index.total}); density {_at_least(size, index.total)} would hold it"
        )
    return head, k - size
