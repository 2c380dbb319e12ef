"""Arithmetic over deltas of one base: add, scale, TIES and DARE.

With b the base's value at a coordinate, t_i that of delta i and w_i its weight, its change is d_i = t_i - b::

    add    b + Σ w_i d_i
    scale  b + w d                        one delta
    ties   b + mean of the w_i d_i that are left after trimming and have the elected sign
    dare   b + Σ w_i d_i / (1 - p)        over the d_i that are left when each is dropped with probability p

Everything is computed in float64 and rounded once to the tensor's dtype. Where one change alone arrives with
factor 1 the result is t_i itself, and where the changes sum to zero it is b, bit for bit: scaling by 1 is the
identity, and adding deltas of disjoint masks is applying one after the other. Changes are summed in ascending
order, so that the order of the deltas does not matter, to the last bit.

**Mask** of the result: the coordinates where a change is left. For ``add`` and ``scale`` that is the union of the
masks, whatever the weights; what ``ties`` and ``dare`` take out is left out. Tensors covered whole stay whole.

**Heads.** A tensor that a mask covers whole is no part of its base's digest, since it may have been drawn anew.
Arithmetic on it needs the very values that each delta was trained from, so it is refused where the base at hand
is not known to hold them, unless a single delta brings the tensor and it is taken as it is. ``head=i`` takes all
tensors that any mask covers whole from delta i, unchanged; those of the others may then have other shapes.

**Buffers** are never added or averaged: equal in all deltas, or those of one (``buffers=i``), or the base's.
"""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from pipeline.deltas.delta import Delta
from pipeline.deltas.summing import Buffers, Sum
from pipeline.deltas.target import Model
from pipeline.errors import ParamsError


def add(
    deltas: Sequence[Delta],
    base: Model,
    weights: Sequence[float] | None = None,
    *,
    buffers: Buffers = "equal",
    head: int | None = None,
) -> Delta:
    """Add the changes of several deltas: b + Σ w_i d_i.

    Args:
        deltas: deltas of one base; their order does not matter.
        base: that base: a module or its state dict.
        weights: one for each delta, finite; 1 for all by default.
        buffers: ``equal`` (they must be), ``base``, or the number of the delta whose are taken.
        head: the delta whose tensors covered whole are taken as they are.

    Returns:
        A delta of the same base on the union of the masks, its parents in ``info``.

    Raises:
        MismatchError: if a delta is of another base or another model, or heads or buffers differ.
        ParamsError: if an argument is out of range, or a result is not finite.
    """  # noqa: DOC502 - raised by what it calls
    return Sum("add", deltas, base, weights, head).result({}, buffers)


def scale(delta: Delta, base: Model, weight: float) -> Delta:
    """Scale the changes of one delta: b + w d; by 1 it stays as it is, by 0 its values are the base's.

    Its buffers are kept, whatever the weight.

    Returns:
        The delta, on the same mask.

    Raises:
        MismatchError: as ``add``.
        ParamsError: as ``add``.
    """  # noqa: DOC502 - raised by what it calls
    return Sum("scale", [delta], base, [weight], None).result({}, "equal")


def ties(
    deltas: Sequence[Delta],
    base: Model,
    weights: Sequence[float] | None = None,
    *,
    density: float = 0.2,
    buffers: Buffers = "equal",
    head: int | None = None,
) -> Delta:
    """Merge deltas by TIES: trim, elect a sign, average what agrees.

    Each delta keeps the round(density · n) largest of its n changes, ties to the lower coordinate. At each
    coordinate the sign of Σ w_i d_i is elected, and the result is b + the mean of the w_i d_i that have it; where
    the sum is zero, b. Source: Yadav et al., "TIES-Merging", NeurIPS 2023 (arXiv 2306.01708), with the density
    taken of a delta's own coordinates and not of the whole network's.

    Args:
        deltas: as ``add``.
        base: as ``add``.
        weights: as ``add``.
        density: the share of each delta's changes that is kept, in (0, 1].
        buffers: as ``add``.
        head: as ``add``; such tensors are not trimmed.

    Returns:
        A delta on the coordinates where a change is left.

    Raises:
        MismatchError: as ``add``.
        ParamsError: as ``add``.
    """  # noqa: DOC502 - raised by what it calls
    if not 0.0 < density <= 1.0:
        raise ParamsError(f"density={density}: expected the share of changes to keep, in (0, 1]")
    total = Sum("ties", deltas, base, weights, head)
    kept = [total.largest(number, density) for number in range(len(deltas))]
    return total.result({"density": density}, buffers, left=lambda i, name: kept[i][name], elect=True)


def dare(
    deltas: Sequence[Delta],
    base: Model,
    weights: Sequence[float] | None = None,
    *,
    drop: float = 0.9,
    seed: int = 0,
    buffers: Buffers = "equal",
    head: int | None = None,
) -> Delta:
    """Merge deltas by DARE: drop changes at random, rescale the others by 1/(1 - p), add.

    Change j of a tensor is dropped where the j-th uniform draw is below ``drop``. The draws are those of numpy's
    Philox generator, keyed by the BLAKE2b-128 of ``"<seed> <digest of the delta> <tensor>"``, so that they depend
    on neither the order of deltas nor of tensors. Source: Yu et al., "Language Models are Super Mario", ICML 2024
    (arXiv 2311.03099).

    Args:
        deltas: as ``add``.
        base: as ``add``.
        weights: as ``add``.
        drop: p, in [0, 1); 0 is ``add``.
        seed: of the draws.
        buffers: as ``add``.
        head: as ``add``; nothing is dropped of such tensors.

    Returns:
        A delta on the coordinates where a change is left.

    Raises:
        MismatchError: as ``add``.
        ParamsError: as ``add``.
    """  # noqa: DOC502 - raised by what it calls
    if not 0.0 <= drop < 1.0:
        raise ParamsError(f"drop={drop}: expected the probability to drop a change, in [0, 1)")

    def left(number: int, name: str) -> Tensor:
        text = f"{seed} {deltas[number].digest} {name}".encode()
        key = int.from_bytes(blake2b(text, digest_size=16).digest(), "little")
        draws = np.random.Generator(np.random.Philox(key=key)).random(deltas[number].mask.count(name))
        return torch.from_numpy(draws >= drop)

    total = Sum("dare", deltas, base, weights, head, rescale=1.0 / (1.0 - drop))
    return total.result({"drop": drop, "seed": seed}, buffers, left=left)
