"""Seeded draws that stay the same in every version of numpy: only PCG64's raw output is used."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


def permutation(count: int, *key: int) -> Rows:
    """Shuffle 0..count-1.

    Args:
        count: how many.
        key: non-negative integers; equal keys give equal orders, other keys independent ones.

    Returns:
        int64 [count].
    """
    # SeedSequence ignores zeros at the end: without the length, (1,) and (1, 0) would draw alike
    raw = np.random.PCG64(np.random.SeedSequence((len(key), *key))).random_raw(count)
    return np.argsort(np.asarray(raw, dtype=np.uint64), kind="stable").astype(np.int64)


def split_by_group(groups: Rows, fraction: float, *key: int) -> tuple[Rows, Rows]:
    """Hold rows out, whole groups at a time: groups in a drawn order until the fraction is reached.

    Args:
        groups: [N], each row's group.
        fraction: of rows to hold out.
        key: of the draw, as in ``permutation``.

    Returns:
        Rows kept and rows held out, each ascending.
    """
    names, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = permutation(len(names), *key)
    before = np.concatenate([[0], np.cumsum(sizes[order])[:-1]])
    held = np.zeros(len(names), dtype=bool)
    held[order[before < fraction * len(groups)]] = True
    return np.flatnonzero(~held[group]).astype(np.int64), np.flatnonzero(held[group]).astype(np.int64)


def split_by_class(labels: NDArray[Any], fraction: float, *key: int) -> tuple[Rows, Rows]:
    """Hold rows out, the same fraction of every class (rounded up).

    Returns:
        Rows kept and rows held out, each ascending.
    """
    held = np.zeros(len(labels), dtype=bool)
    for position, label in enumerate(np.unique(labels)):
        rows = np.flatnonzero(labels == label)
        held[rows[permutation(len(rows), *key, position)[: int(np.ceil(fraction * len(rows)))]]] = True
    return np.flatnonzero(~held).astype(np.int64), np.flatnonzero(held).astype(np.int64)
