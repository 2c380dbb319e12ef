"""A split cut into batches: orders that a seed decides, batches made when they are asked for."""

from collections.abc import Callable, Sequence
from typing import overload

import numpy as np

from pipeline.losses import Batch
from pipeline.tasks.draws import Rows, permutation

_BUCKET = 50  # batches whose examples are sorted by length together: padding nearly gone, order still random


class Batches(Sequence[Batch]):
    """Batches by position, so that a resumed epoch starts anywhere without making those before.

    Attributes:
        groups: the rows of each batch.
    """

    def __init__(self, groups: Sequence[Rows], make: Callable[[int, Rows], Batch]) -> None:
        """Name the rows of each batch.

        Args:
            groups: int64 rows of the split, batch by batch.
            make: (position, rows) -> batch; equal arguments give equal batches.
        """
        self.groups = list(groups)
        self._make = make

    def __len__(self) -> int:
        return len(self.groups)

    @overload
    def __getitem__(self, position: int) -> Batch: ...
    @overload
    def __getitem__(self, position: slice) -> Sequence[Batch]: ...
    def __getitem__(self, position: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        if not -len(self) <= position < len(self):
            raise IndexError(f"batch {position} of {len(self)}")
        position %= len(self)
        return self._make(position, self.groups[position])

    @property
    def rows(self) -> Rows:
        """All rows, in the order in which the batches hold them."""
        return np.concatenate(self.groups) if self.groups else np.zeros(0, dtype=np.int64)

    @property
    def examples(self) -> int:
        """How many examples the batches hold together."""
        return sum(len(group) for group in self.groups)


def cut(rows: Rows, size: int) -> list[Rows]:
    """Cut rows into batches in the given order; the last may be smaller.

    Returns:
        The rows of each batch.
    """
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def shuffled(rows: Rows, size: int, lengths: Rows | None, seed: int, epoch: int) -> list[Rows]:
    """One epoch's batches: every row once, in an order that (seed, epoch) decides.

    Where lengths differ, stretches of 50 batches of the shuffled rows are sorted by length and cut, and the
    batches are shuffled, so that a batch holds examples of similar length.

    Returns:
        The rows of each batch.
    """
    order = rows[permutation(len(rows), seed, epoch, 1)]
    if lengths is None:
        return cut(order, size)
    groups: list[Rows] = []
    for stretch in cut(order, size * _BUCKET):
        groups += cut(stretch[np.argsort(lengths[stretch], kind="stable")], size)
    return [groups[i] for i in permutation(len(groups), seed, epoch, 2)]


def by_length(rows: Rows, size: int, lengths: Rows | None) -> list[Rows]:
    """Batches for evaluation, where order does not matter: the longest examples first, least padding.

    Returns:
        The rows of each batch.
    """
    return cut(rows if lengths is None else rows[np.argsort(-lengths[rows], kind="stable")], size)
