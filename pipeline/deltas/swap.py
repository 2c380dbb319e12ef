"""Swapping two deltas of one base in place, without reading what neither of them trained.

Which coordinates two masks share does not change from swap to swap, so it is worked out once per pair of masks.
A swap then gathers each tensor's values at the union of both, compares those of the delta to take out, and writes
the union back; what it gathered is also what a write that fails is undone with.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pipeline.deltas import applying
from pipeline.deltas.base import SHORT, Undo
from pipeline.deltas.target import Model, Target, same_bits, write_over
from pipeline.errors import MismatchError
from pipeline.masks.mask import Mask
from pipeline.parameters import byte_view, take, tensor_digest

if TYPE_CHECKING:
    from pipeline.deltas.delta import Delta

_unions: WeakIdKeyDictionary = WeakIdKeyDictionary()  # mask -> mask -> the unions; forgotten with either mask


class Union(NamedTuple):
    """The coordinates of a tensor that either of two masks has; int64 on the CPU, None for all.

    Attributes:
        at: the coordinates, sorted.
        first: where among them the first mask's stand.
        second: where the second mask's stand.
        covered: whether the second mask has all of them.
    """

    at: Tensor | None
    first: Tensor | None
    second: Tensor | None
    covered: bool


def swap_(model: Model, a: "Delta", b: "Delta") -> None:
    """Turn base + ``a`` into base + ``b``; see ``Delta.swap_``.

    Raises:
        MismatchError: if the deltas are of different models or bases.
    """
    if a.layout != b.layout or a.mask.index.shapes != b.mask.index.shapes or a.buffers.keys() != b.buffers.keys():
        raise MismatchError("the two deltas are of different models")
    target = Target(model, a.layout, b.buffers)
    if not _same_base(a, b, a.undo_for(target)):
        raise MismatchError("the two deltas are of different bases; revert the first, then apply the second")
    exchange_(target, a, b)


def exchange_(target: Target, a: "Delta", b: "Delta") -> None:
    """Swap two deltas that are known to be of one base and of the target's model.

    Args:
        target: the model, with the buffers of ``b``.
        a: the delta to take out.
        b: the delta to put in.

    Raises:
        MismatchError: if the model does not hold ``a``, or base values are missing.
    """
    undo = a.undo_for(target)
    unions = _unions_of(a.mask, b.mask)
    places = {name: [(tensor, _on(union.at, tensor)) for tensor in (target.parameters[name], *target.copies[name])]
              for name, union in unions.items()}  # fmt: skip
    found = {name: take(*places[name][0]) for name in unions}
    now = {name: values.cpu() for name, values in found.items()}
    _check_held(a, target, now, unions)
    before = {
        name: torch.empty(0, dtype=form[0]) for name, form in b.layout.parameters.items() if name in b.mask.index
    }
    new: dict[str, Tensor] = {}
    for name, union in unions.items():
        if undo is None and (b.thin is not None or not union.covered):
            raise MismatchError(
                f"the base's values of tensor '{name}' are not known, and the second delta does not cover all of "
                "the first, or is coded against them; take the first with keep_base=True, or apply it to this "
                "model here"
            )
        new[name] = now[name].clone()  # on the CPU, what was gathered serves to undo
        if undo is not None:
            _put(new[name], union.first, undo.values[name])
        before[name] = _pick(new[name], union.second).clone()
    b.fill_(before)
    writes = []
    for name, union in unions.items():
        _put(new[name], union.second, b.values[name])
        for number, (tensor, at) in enumerate(places[name]):
            former = take(tensor, at) if number else found[name]
            writes.append((tensor, at, new[name].to(tensor.device), former))
    write_over(writes + [(*write, take(write[0], None)) for write in target.buffer_writes(b.buffers)])
    a.remember(target, None)
    b.remember(target, None if undo is None else Undo(before, undo.buffers))


def _unions_of(first: Mask, second: Mask) -> dict[str, Union]:
    """Unite two masks tensor by tensor, once: name -> union, where there are coordinates."""
    known: WeakIdKeyDictionary = _unions.setdefault(first, WeakIdKeyDictionary())
    if second not in known:
        known[second] = {
            name: _unite(first, second, name) for name in second.index if first.count(name) or second.count(name)
        }
    unions: dict[str, Union] = known[second]
    return unions


def _unite(first: Mask, second: Mask, name: str) -> Union:
    one, two = first.at(name), second.at(name)
    if one is None or two is None:
        return Union(None, one, two, two is None)
    joined = np.sort(np.concatenate([one.numpy(), two.numpy()]), kind="stable")  # merges two sorted runs
    at = torch.from_numpy(joined[np.diff(joined, prepend=-1) > 0])
    if len(at) == first.index.numel(name):
        return Union(None, one, two, len(at) == len(two))
    one_in, two_in = (None if len(at) == len(part) else torch.searchsorted(at, part) for part in (one, two))
    return Union(at, one_in, two_in, len(at) == len(two))


def _check_held(a: "Delta", target: Target, now: Mapping[str, Tensor], unions: Mapping[str, Union]) -> None:
    """Check that the values gathered, and the buffers, are the first delta's: one comparison per dtype."""
    parts: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for name, union in unions.items():
        held, wanted = parts.setdefault(now[name].dtype, ([], []))
        held.append(_pick(now[name], union.first))
        wanted.append(a.values[name])
    same = all(torch.equal(*(byte_view(torch.cat(side)) for side in sides)) for sides in parts.values())
    if not same or not all(same_bits(target.buffers[name], buffer) for name, buffer in a.buffers.items()):
        applying.check_held(a, target)  # says where


def _on(at: Tensor | None, tensor: Tensor) -> Tensor | None:
    return at if at is None else at.to(tensor.device)


def _pick(values: Tensor, places: Tensor | None) -> Tensor:
    return values if places is None else values.index_select(0, places)


def _put(values: Tensor, places: Tensor | None, new: Tensor) -> None:
    if places is None:
        values.copy_(new.reshape(-1))
    else:
        values.index_copy_(0, places, new)


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
