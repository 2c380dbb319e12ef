"""Staircase coding: coordinates of matrices whose rows and columns each have a rate of their own.

A Fisher score of a weight is close to a product of a row's and a column's share, so a threshold on it chooses a
staircase: with the columns sorted by their counts, every row is nearly a prefix. Stored are the rows and columns
that hold anything, their counts, and the few cells in which the staircase is wrong. On the Fisher mask of a
MiniLM's pooler, 92,639 of 147,456 coordinates, 4 cells are.

A tensor is a matrix of its first dimension by all others; a vector is one row. All tensors share seven streams,
one after the other, of LEB128 integers under LZMA: the tensors' (rows, columns, wrong cells) held; the gaps before
each row held; its count - 1; the same two for columns; the gaps before each wrong cell, counted down the columns
of the sorted matrix.
"""

import zlib
from typing import NamedTuple

import numpy as np

from pipeline.masks.rice import gaps_of
from pipeline.masks.squeeze import bound, expand, pack_integers, squeeze, unpack_integers

Array = np.ndarray
_CELLS = 64  # cells of the held rows x columns per coordinate, at most: sparser ones say little


class Stairs(NamedTuple):
    """One matrix taken apart; each field is int64 and ready for ``pack_integers``."""

    sizes: Array
    row_gaps: Array
    row_counts: Array
    column_gaps: Array
    column_counts: Array
    wrong: Array


def matrix_shape(shape: tuple[int, ...], numel: int) -> tuple[int, int]:
    """Read a tensor as a matrix: its first dimension by all others; a vector is one row.

    Returns:
        Rows and columns.
    """
    rows = shape[0] if len(shape) > 1 else 1
    return rows, numel // max(rows, 1)


def take_apart(coordinates: Array, columns: int) -> Stairs | None:
    """Take one matrix of coordinates apart.

    Args:
        coordinates: int64 [k], k > 0, strictly increasing.
        columns: of the matrix.

    Returns:
        Its parts, or None where it is too sparse for its rows and columns to say much.
    """
    row, column = np.divmod(coordinates, columns)
    rows, row_at, row_counts = np.unique(row, return_inverse=True, return_counts=True)
    held, column_at, column_counts = np.unique(column, return_inverse=True, return_counts=True)
    if len(rows) * len(held) > _CELLS * len(coordinates):
        return None
    cells = np.zeros((len(rows), len(held)), dtype=bool)
    cells[row_at, column_at] = True
    across = np.argsort(-column_counts, kind="stable")
    down = np.argsort(-row_counts, kind="stable")
    wrong = np.flatnonzero((cells ^ _staircase(row_counts, across))[down][:, across].T)
    sizes = np.array([len(rows), len(held), len(wrong)])
    return Stairs(sizes, gaps_of(rows), row_counts - 1, gaps_of(held), column_counts - 1, gaps_of(wrong))


def _staircase(row_counts: Array, across: Array) -> Array:
    """Fill each row with its count of cells, the fullest columns first."""
    kind = np.int16 if len(across) < 1 << 15 else np.int32  # the narrower, the faster to compare
    rank = np.empty(len(across), dtype=kind)
    rank[across] = np.arange(len(across), dtype=kind)
    return np.asarray(rank < np.minimum(row_counts, len(across)).astype(kind)[:, None])


def estimate(stairs: Stairs) -> int:
    """Estimate the bytes a matrix adds to the shared streams.

    Returns:
        What DEFLATE makes of it alone, which is quick and a little more.
    """
    packed = zlib.compress(b"".join(pack_integers(part) for part in stairs), 6, -15)
    return max(len(packed) - 4, 1)  # four bytes: what a stream of its own costs


def encode(parts: list[Stairs]) -> bytes | None:
    """Code all matrices together.

    Returns:
        The code, or None if it is so small that a reader would refuse what it expands to.
    """
    data = b"".join(pack_integers(np.concatenate(stream)) for stream in zip(*parts, strict=True))
    code = squeeze(data)
    cells = sum(int(part.sizes[0] * part.sizes[1]) for part in parts)
    return code if max(cells, len(data)) <= bound(code) else None


def decode(code: Array, shapes: list[tuple[int, int]]) -> list[Array]:
    """Decode the coordinates of all matrices.

    Args:
        code: uint8.
        shapes: rows and columns of each matrix.

    Returns:
        int64 [k], strictly increasing and within its matrix, for each.

    Raises:
        ValueError: if the code does not hold exactly that.
    """
    integers = unpack_integers(expand(code.tobytes()))
    if len(integers) < 3 * len(shapes):
        raise ValueError("it holds too few integers")
    sizes, rest = integers[: 3 * len(shapes)].reshape(-1, 3), integers[3 * len(shapes) :]
    limits = np.array(shapes, dtype=np.int64).reshape(-1, 2)
    held = sizes[:, :2]
    if (held > limits).any() or (held >= 1 << 31).any() or (sizes > len(rest)).any():
        raise ValueError("it holds more rows or columns than its tensors")
    cells = held[:, 0] * held[:, 1]
    if (cells > bound(code)).any() or int(cells.sum()) > bound(code):
        raise ValueError(f"{len(code)} bytes claim to hold {int(cells.sum())} cells")
    totals = sizes.sum(axis=0)
    lengths = [totals[i] for i in (0, 0, 1, 1, 2)]
    if int(sum(lengths)) != len(rest):
        raise ValueError(f"it holds {len(rest)} integers instead of {int(sum(lengths))}")
    rows, row_counts, columns, column_counts, wrong = np.split(rest, np.cumsum(lengths)[:-1])
    row_counts = row_counts + 1
    if (row_counts < 1).any() or (row_counts > np.repeat(held[:, 1], held[:, 0])).any():
        raise ValueError("a row holds more cells than there are columns")
    held_cells = [
        _held(*each)
        for each in zip(
            _pieces(row_counts, sizes[:, 0]),
            _pieces(-column_counts, sizes[:, 1]),
            _pieces(_positions(wrong, sizes[:, 2], cells), sizes[:, 2]),
            strict=True,
        )
    ]
    rows, columns = _positions(rows, sizes[:, 0], limits[:, 0]), _positions(columns, sizes[:, 1], limits[:, 1])
    return _put_together(limits[:, 1], sizes, rows, row_counts, columns, held_cells)


def _pieces(values: Array, lengths: Array) -> list[Array]:
    ends = np.cumsum(lengths).tolist()
    return [values[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _held(row_counts: Array, column_counts: Array, wrong: Array) -> Array:
    """Find the held cells of one matrix of held rows x columns, row by row; column counts come negated."""
    across = np.argsort(column_counts, kind="stable")
    cells = _staircase(row_counts, across).reshape(-1)
    if len(wrong):
        column_at, row_at = np.divmod(wrong, len(row_counts))
        cells[np.argsort(-row_counts, kind="stable")[row_at] * len(across) + across[column_at]] ^= True
    return np.flatnonzero(cells)


def _put_together(
    widths: Array, sizes: Array, rows: Array, row_counts: Array, columns: Array, held_cells: list[Array]
) -> list[Array]:
    """Turn the held cells of all matrices into coordinates: one pass over all of them, row by row."""
    first = np.cumsum(sizes, axis=0) - sizes  # of each matrix: its first row, column and wrong cell
    own = sizes[:, 0]
    in_row, across = np.repeat(sizes[:, 1], own), np.repeat(first[:, 1], own)
    starts = (np.arange(len(rows)) - np.repeat(first[:, 0], own)) * in_row
    held = np.concatenate([*held_cells, np.empty(0, dtype=np.int64)])
    ends = np.cumsum(row_counts)
    begins = ends - row_counts
    if int(row_counts.sum()) != len(held) or (
        len(held) and ((held[begins] < starts).any() or (held[ends - 1] >= starts + in_row).any())
    ):
        raise ValueError("its rows do not hold as many cells as they say")
    held -= np.repeat(starts - across, row_counts)
    flat = columns[held]
    flat += np.repeat(rows * np.repeat(widths, own), row_counts)
    return _pieces(flat, np.array([len(own_cells) for own_cells in held_cells], dtype=np.int64))


def _positions(gaps: Array, lengths: Array, limits: Array) -> Array:
    """Sum the gaps of each tensor up to positions, refusing any that is not below the tensor's limit."""
    sums = np.cumsum(gaps + 1)
    if gaps.sum(dtype=np.float64) >= 2.0**62:  # beyond any mask's size, and where int64 sums could wrap
        raise ValueError("a coordinate lies outside its tensor")
    ends = np.cumsum(lengths)
    before = np.concatenate([[0], sums])[ends - lengths]
    if (np.concatenate([[0], sums])[ends] - before > limits).any():
        raise ValueError("a coordinate lies outside its tensor")
    return np.asarray(sums - 1 - np.repeat(before, lengths))
