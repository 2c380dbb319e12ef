"""Predict trained values from their base: a matrix whose rows and columns moved together, by its rank-1 change.

The change of a weight in a short training is close to a sum of outer products of output gradients and inputs, and
one of them often dominates: 90 % of the squared change of MiniLM's pooler on ``words``. With u of the rows and v
of the columns that hold anything, in half precision, the prediction of a value is base + u_i v_j in float64,
rounded to float32 and then to the dtype: the same bits on every machine. Other tensors are predicted by the base.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.parameters import Shape

Array = np.ndarray
_STEPS = 6  # of alternating least squares; the second factor is 3 to 10 times smaller, so few converge


class Place(NamedTuple):
    """Where a stretch of values stands.

    Attributes:
        shape: of the tensor.
        coordinates: int64 [count], row-major, on the CPU; None for the whole tensor.
        held: how many values it has.
    """

    shape: Shape
    coordinates: Tensor | None
    held: int


class Grid(NamedTuple):
    """The rows and columns that hold values, numbered without gaps: of each value, and how many there are."""

    row: Array
    column: Array
    rows: int
    columns: int

    @property
    def lines(self) -> int:
        """How many factors there are."""
        return self.rows + self.columns


Factors = list[tuple[Grid, Array] | None]
"""Of each stretch: its grid and half precision [rows + columns], u and then v; None where the base predicts."""


def write_factors(values: Tensor, base: Tensor, places: Sequence[Place]) -> tuple[bytes, Tensor]:
    """Fit each stretch that is a matrix with more values than rows and columns, and keep what saves bits.

    Args:
        values: [count], on the CPU.
        base: the base's, likewise.
        places: of the stretches, in order.

    Returns:
        A bit per stretch and the factors, to be read by ``read_factors``; and the predictions [count].
    """
    predicted, fitted, factors = base.clone(), np.zeros(len(places), bool), []
    for number, (place, stretch) in enumerate(zip(places, _stretches(places), strict=True)):
        if not base.is_floating_point() or len(place.shape) < 2 or place.held <= place.shape[0]:
            continue
        grid, now, before = _grid(place), values[stretch], base[stretch]
        change = now.double() - before.double()
        if grid.lines >= place.held or not bool((change.abs() < 1e100).all()):  # whose squares are finite
            continue
        with np.errstate(all="ignore"):  # what overflows predicts nothing
            pair = _fit(change.numpy(), grid)
        guess = _predict(before, grid, pair)
        if _misses(now, guess) + 8 * len(pair.tobytes()) < _misses(now, before):
            predicted[stretch] = guess
            fitted[number] = True
            factors.append(pair)
    return np.packbits(fitted).tobytes() + b"".join(pair.tobytes() for pair in factors), predicted


def read_factors(take: Callable[[int], Array], dtype: torch.dtype, places: Sequence[Place]) -> Factors:
    """Read what ``write_factors`` wrote; the base is not needed for it.

    Args:
        take: gives the next so many bytes, uint8.
        dtype: of the values.
        places: of the stretches, in order.

    Returns:
        The factors.

    Raises:
        ValueError: if a stretch that is no matrix of floats has factors.
    """
    flags = np.unpackbits(take((len(places) + 7) // 8))
    if flags[len(places) :].any():
        raise ValueError("it predicts more tensors than there are")
    factors: Factors = []
    for fitted, place in zip(flags, places, strict=False):
        if fitted and (not dtype.is_floating_point or len(place.shape) < 2):
            raise ValueError("it predicts a tensor that is no matrix of floats")
        grid = _grid(place) if fitted else None
        factors.append(grid and (grid, np.frombuffer(take(2 * grid.lines).tobytes(), "<f2")))
    return factors


def predict(base: Tensor, places: Sequence[Place], factors: Factors) -> Tensor:
    """Predict values as ``write_factors`` did.

    Args:
        base: the base's values [count], on the CPU.
        places: of the stretches, in order.
        factors: theirs.

    Returns:
        The predictions [count].
    """
    predicted = base.clone()
    for pair, stretch in zip(factors, _stretches(places), strict=True):
        if pair is not None:
            predicted[stretch] = _predict(base[stretch], *pair)
    return predicted


def _stretches(places: Sequence[Place]) -> list[slice]:
    ends = list(accumulate(place.held for place in places))
    return [slice(end - place.held, end) for end, place in zip(ends, places, strict=True)]


def _grid(place: Place) -> Grid:
    at = np.arange(place.held) if place.coordinates is None else place.coordinates.numpy()
    row, column = np.divmod(at, prod(place.shape[1:]))
    (row, rows), (column, columns) = _numbered(row), _numbered(column)
    return Grid(row, column, rows, columns)


def _numbered(lines: Array) -> tuple[Array, int]:
    """Number the lines that occur, in order: of each entry, and how many there are."""
    occurs = np.zeros(int(lines.max(initial=-1)) + 1, dtype=bool)
    occurs[lines] = True
    return (np.cumsum(occurs) - 1)[lines], int(occurs.sum())


def _fit(change: Array, grid: Grid) -> Array:
    """Fit change_k ~ u[row_k] v[column_k] by least squares: half precision [rows + columns], u and then v."""
    u, v = np.zeros(grid.rows), np.zeros(grid.columns)
    fullest = grid.row == np.bincount(grid.row, change * change).argmax()
    v[grid.column[fullest]] = change[fullest]
    for _ in range(_STEPS):
        u = _solve(change, v[grid.column], grid.row, grid.rows)
        u /= np.abs(u).max() or 1.0  # else one factor would vanish while the other grows
        v = _solve(change, u[grid.row], grid.column, grid.columns)
    scale = np.sqrt((np.abs(v).max() or 1.0) / (np.abs(u).max() or 1.0))
    return np.concatenate([u * scale, v / scale]).clip(-60000, 60000).astype("<f2")


def _solve(change: Array, other: Array, line: Array, lines: int) -> Array:
    """Solve for the factor of each line, the other factor given; lines where it vanishes get 0."""
    weight = np.bincount(line, other * other, lines)
    solved: Array = np.bincount(line, change * other, lines) / np.where(weight > 0, weight, 1)
    return solved


def _predict(base: Tensor, grid: Grid, pair: Array) -> Tensor:
    factors = torch.from_numpy(pair.astype(np.float64))
    change = factors[: grid.rows][grid.row] * factors[grid.rows :][grid.column]
    guess = base.double() + change
    if base.dtype != torch.float64:
        guess = guess.float().to(base.dtype)
    return torch.where(guess.isfinite(), guess, base)


def _misses(values: Tensor, guess: Tensor) -> float:
    """Estimate the bits of what a guess misses, up to a constant."""
    form = torch.finfo(values.dtype)
    miss = (values.double() - guess.double()).abs()
    return float((miss + form.eps * values.double().abs() + form.tiny).log2().sum())
