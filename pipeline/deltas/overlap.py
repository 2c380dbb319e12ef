"""Where deltas of one base overlap, and where they pull in opposite directions."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch

from pipeline.deltas.delta import Delta
from pipeline.deltas.origin import origin
from pipeline.deltas.target import Model, Target


def overlap(deltas: Sequence[Delta], base: Model | None = None) -> dict[str, Any]:
    """Report, pair by pair and tensor by tensor, what two deltas share.

    A conflict is a shared coordinate that one delta raises and the other lowers: (t_a - b)(t_b - b) < 0. None is
    counted in tensors that a delta covers whole, since it may have started from other values there (a fresh
    head). Tensors of different shapes, such as heads for other numbers of classes, are left out.

    Args:
        deltas: deltas of one base.
        base: the base, to count conflicts; a module or its state dict.

    Returns:
        ``pairs`` and ``tensors``: rows of ``a``, ``b`` (numbers of deltas), ``count_a``, ``count_b``, ``shared``,
        ``jaccard`` (shared / in either), ``conflicts`` and ``conflict_share`` (of the shared ones); the last two
        None without a base, and the share where nothing is shared. ``tensors`` has ``name`` too, and a row for
        each tensor that both have coordinates in.

    Raises:
        MismatchError: if a delta is not one of this base.
    """  # noqa: DOC502 - raised by what it calls
    sources = [None if base is None else origin(delta, base) for delta in deltas]
    pairs, tensors = [], []
    for (a, one), (b, two) in combinations(enumerate(deltas), 2):
        rows = []
        for name in one.mask.index:
            if one.mask.index.shapes[name] == two.mask.index.shapes.get(name):
                rows.append({"name": name} | _shared(one, two, name, sources[a]))
        total = {key: sum(row[key] for row in rows) for key in ("count_a", "count_b", "shared")}
        total["conflicts"] = None if base is None else sum(row["conflicts"] or 0 for row in rows)
        pairs.append({"a": a, "b": b} | _rates(total))
        tensors += [{"a": a, "b": b} | _rates(row) for row in rows if row["count_a"] and row["count_b"]]
    return {"pairs": pairs, "tensors": tensors}


def _shared(one: Delta, two: Delta, name: str, source: Target | None) -> dict[str, Any]:
    """Count what two deltas share of one tensor."""
    mine, theirs = one.mask.indices[name], two.mask.indices[name]
    at, in_one, in_two = np.intersect1d(mine.numpy(), theirs.numpy(), assume_unique=True, return_indices=True)
    row: dict[str, Any] = {
        "count_a": mine.numel(),
        "count_b": theirs.numel(),
        "shared": len(at),
        "conflicts": None,
    }
    if source is not None and name in source.parameters and not two.mask.whole(name):
        before = source.read(name, torch.from_numpy(at)).double()
        up = [d.values[name][place].double() - before for d, place in ((one, in_one), (two, in_two))]
        row["conflicts"] = int((up[0].sign() * up[1].sign() < 0).sum())
    return row


def _rates(row: dict[str, Any]) -> dict[str, Any]:
    """Add the Jaccard index and the share of conflicts."""
    either = row["count_a"] + row["count_b"] - row["shared"]
    share = None if row["conflicts"] is None or not row["shared"] else row["conflicts"] / row["shared"]
    return row | {"jaccard": row["shared"] / either if either else 1.0, "conflict_share": share}
