"""Swapping two deltas of one base in place, without reading what neither of them trained."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.deltas.base import SHORT, Undo
from pipeline.deltas.target import Model, Target, Write, write_all
from pipeline.errors import MismatchError
from pipeline.parameters import tensor_digest

if TYPE_CHECKING:
    from pipeline.deltas.delta import Delta


def swap_(model: Model, a: "Delta", b: "Delta") -> None:
    """Turn base + ``a`` into base + ``b``; see ``Delta.swap_``.

    Raises:
        MismatchError: if the model does not hold ``a``, the bases differ, or base values are missing.
    """
    if a.layout != b.layout or a.mask.index.shapes != b.mask.index.shapes or a.buffers.keys() != b.buffers.keys():
        raise MismatchError("the two deltas are of different models")
    target = Target(model, a.layout, b.buffers)
    undo = a.undo_for(target)
    if not _same_base(a, b, undo):
        raise MismatchError("the two deltas are of different bases; revert the first, then apply the second")
    a.check_held(target)
    writes: list[Write] = []
    before: dict[str, Tensor] = {}
    for name in b.mask.index:
        old, new = a.mask.indices[name], b.mask.indices[name]
        in_new, in_old = _shared(new, old)
        before[name] = target.read(name, b.at(name))
        if undo is not None:
            before[name][in_new] = undo.values[name][in_old]
        left = torch.ones(old.numel(), dtype=torch.bool)
        left[in_old] = False
        if bool(left.any()):
            if undo is None:
                raise MismatchError(
                    f"the base's values of tensor '{name}' are not known, and the second delta does not cover "
                    "all of the first; take the first with keep_base=True, or apply it to this model here"
                )
            writes += target.writes(name, old[left], undo.values[name][left])
        if new.numel():
            writes += target.writes(name, b.at(name), b.values[name])
    write_all([*writes, *target.buffer_writes(b.buffers)])
    a.remember(target, None)
    b.remember(target, None if undo is None else Undo(before, undo.buffers))


def _shared(some: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Match two sorted coordinate vectors: positions of the shared ones in ``some``, and in ``others``."""
    if not some.numel() or not others.numel():
        nowhere = torch.empty(0, dtype=torch.int64)
        return nowhere, nowhere
    place = torch.searchsorted(others, some).clamp_(max=others.numel() - 1)
    shared = (others[place] == some).nonzero().reshape(-1)
    return shared, place[shared]


def _same_base(a: "Delta", b: "Delta", undo: Undo | None) -> bool:
    """Tell whether base + b can be reached from base + a: every tensor that b does not replace whole is as b's."""
    if a.base == b.base:
        return True
    for name, (_, shape) in b.layout.parameters.items():
        if name in b.mask.index and b.mask.whole(name):
            continue
        have = a.known.tensors.get(name)
        if name in a.mask.index and a.mask.whole(name):  # any would do for a; the undo has the one at hand
            have = tensor_digest(undo.values[name].reshape(shape))[:SHORT] if undo else None
        if have is None or have != b.known.tensors.get(name):
            return False
    return True
