"""The sum of deltas of one base, tensor by tensor: what all of algebra.py comes down to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.deltas.base import SHORT, Base
from pipeline.deltas.delta import Delta
from pipeline.deltas.origin import decode_
from pipeline.deltas.target import Model, Target, dtype_name, same_bits
from pipeline.errors import MismatchError, ParamsError
from pipeline.masks.mask import Mask
from pipeline.masks.topk import top_coordinates
from pipeline.parameters import digest_of_digests

Buffers = int | Literal["equal", "base"]
Left = Callable[[int, str], Tensor | None]  # delta, tensor -> bool [count]: the changes that are left; None: all


@dataclass(frozen=True)
class _Terms:
    """What D deltas make of one tensor, at the K coordinates that any of them covers.

    Attributes:
        at: the coordinates, int64 [K]; None for the whole tensor.
        before: the base's values [K].
        after: the deltas' values [D, K], in the base's dtype; the base's where a delta does not cover one.
        left: bool [D, K], where a change is left.
    """

    at: Tensor | None
    before: Tensor
    after: Tensor
    left: Tensor


class Sum:
    """Deltas, weights and base, checked to belong together, and their sum tensor by tensor."""

    def __init__(
        self,
        method: str,
        deltas: Sequence[Delta],
        base: Model,
        weights: Sequence[float] | None,
        head: int | None,
        rescale: float = 1.0,
    ) -> None:
        self.method, self.deltas, self.head = method, list(deltas), head
        if not self.deltas:
            raise ParamsError(f"{method}: no delta is given; name at least one")
        self.weights = [1.0] * len(self.deltas) if weights is None else [float(w) for w in weights]
        if len(self.weights) != len(self.deltas) or not all(isfinite(w) for w in self.weights):
            raise ParamsError(
                f"weights {self.weights}: expected {len(self.deltas)} finite numbers, one for each delta"
            )
        if head is not None:
            _check_number("head", head, self.deltas)
        self.lead = self.deltas[head or 0]
        self.whole = {n for d in self.deltas for n in d.mask.index if d.mask.whole(n) and d.mask.count(n)}
        for number, delta in enumerate(self.deltas):
            self._check_form(number, delta)
        self.base, self.source = base, Target(base, self.lead.layout, {})
        self.digests = self.source.digests()
        for number, delta in enumerate(self.deltas):
            self._check_base(number, delta)
            decode_(delta, self.source.read)
        self.factors = torch.tensor([w * rescale for w in self.weights], dtype=torch.float64)

    def _check_form(self, number: int, delta: Delta) -> None:
        """Check that a delta is of the same network as the leading one, heads aside where one is chosen."""
        skip = self.whole if self.head is not None else set()
        mine, wanted = delta.layout.parameters, self.lead.layout.parameters
        for name in sorted((mine.keys() | wanted.keys()) - skip):
            chosen = (name in delta.mask.index) == (name in self.lead.mask.index)
            if mine.get(name) == wanted.get(name) and chosen:
                continue
            forms = [
                "absent" if f is None else f"{dtype_name(f[0])} {list(f[1])}"
                for f in (mine.get(name), wanted.get(name))
            ]
            why = f"{forms[0]} in delta {number} and {forms[1]} in delta {self.head or 0}"
            if name in self.whole:
                raise MismatchError(f"tensor '{name}' is {why}; choose whose head to keep (head=N)")
            raise MismatchError(
                f"tensor '{name}' is {why if chosen else 'trainable in one delta and frozen in another'}; "
                "compose deltas of one base"
            )

    def _check_base(self, number: int, delta: Delta) -> None:
        """Check that the base is a delta's, and where its heads take part in the arithmetic, that they are too."""
        if not delta.known.is_of(self.digests, delta.whole):
            raise MismatchError(f"delta {number}: {delta.known.difference(self.digests, delta.whole)}")
        if self.head is not None or delta.base == digest_of_digests(self.digests):
            return
        for name in delta.whole:
            users = [w for d, w in zip(self.deltas, self.weights, strict=True) if d.mask.count(name)]
            copied = users == [1.0] and self.method in ("add", "scale")
            if not copied and users and delta.known.tensors.get(name) != self.digests[name][:SHORT]:
                raise MismatchError(
                    f"tensor '{name}' is covered whole by delta {number}, and the base at hand is not known to "
                    "hold the values that it was trained from; choose whose head to keep (head=N)"
                )

    def largest(self, number: int, density: float) -> dict[str, Tensor]:
        """Flag the round(density · n) largest changes of a delta: name -> bool [count]."""
        delta, sizes = self.deltas[number], {}
        for name in delta.mask.index:
            if self.head is None or name not in self.whole:
                change = delta.values[name].double() - self.source.read(name, delta.at(name)).double()
                if not bool(change.isfinite().all()):
                    raise ParamsError(f"tensor '{name}' of delta {number} is not finite; leave that delta out")
                sizes[name] = change.abs()
        chosen = top_coordinates(sizes, round(density * sum(s.numel() for s in sizes.values())))
        flags = {name: torch.zeros(size.numel(), dtype=torch.bool) for name, size in sizes.items()}
        for name, positions in chosen.items():
            flags[name][positions] = True
        return flags

    def result(
        self, parameters: dict[str, Any], buffers: Buffers, left: Left = lambda i, name: None, elect: bool = False
    ) -> Delta:
        """Sum all tensors."""
        kept_buffers = self._buffers(buffers)
        indices, values, whole = {}, {}, []
        for name in self.lead.mask.index:
            if self.head is not None and name in self.whole:
                at, values[name] = self.lead.at(name), self.lead.values[name]
            else:
                at, values[name] = self._combined(name, self._terms(name, left), elect)
            if at is None:
                whole.append(name)
            else:
                indices[name] = at
        made = {"method": self.method, "weights": self.weights, "buffers": buffers, "head": self.head} | parameters
        parents = [{"digest": d.digest, "info": d.info} for d in self.deltas]
        mask = Mask.covering(
            self.lead.mask.index, whole, indices, {"parents": [d.mask.digest for d in self.deltas]}
        )
        digest = digest_of_digests(self.digests, without=mask.whole_tensors)
        known = Base(digest, tensors={name: found[:SHORT] for name, found in self.digests.items()})
        info = self._common_info() | {"compose": made, "parents": parents}
        return Delta(mask, values, kept_buffers, known, self.lead.layout, info)

    def _common_info(self) -> dict[str, Any]:
        """What the model is loaded with: the leading delta's where its head is kept, else what all agree on."""
        own = {key: value for key, value in self.lead.info.items() if key not in ("parent", "parents")}
        if self.head is not None:
            return own
        return {k: v for k, v in own.items() if all(d.info.get(k) == v for d in self.deltas)}

    def _terms(self, name: str, left: Left) -> _Terms:
        """Bring the deltas' values of one tensor to common coordinates."""
        covers = [delta.mask.indices[name] for delta in self.deltas]
        whole = name in self.whole
        at = None if whole else torch.from_numpy(np.unique(np.concatenate([c.numpy() for c in covers])))
        before = self.source.read(name, at)
        after = before.repeat(len(covers), 1)
        flags = torch.zeros(after.shape, dtype=torch.bool)
        for number, (delta, cover) in enumerate(zip(self.deltas, covers, strict=True)):
            place = cover if at is None else torch.searchsorted(at, cover)
            after[number, place] = delta.values[name]
            kept = left(number, name)
            flags[number, place] = True if kept is None else kept
        return _Terms(at, before, after, flags)

    def _combined(self, name: str, terms: _Terms, elect: bool) -> tuple[Tensor | None, Tensor]:
        """Sum the changes of one tensor: the coordinates that stay (None: all), and their values."""
        arrives = terms.left & (self.factors != 0.0)[:, None]
        changes = self.factors[:, None] * (terms.after.double() - terms.before.double())
        changes = torch.where(arrives, changes, 0.0)
        total = changes.sort(dim=0).values.sum(dim=0)
        stays = terms.left.any(dim=0)
        if elect:
            arrives &= (changes.sign() == total.sign()) & (changes != 0.0)
            stays = arrives.any(dim=0)
            agreed = torch.where(arrives, changes, 0.0).sort(dim=0).values.sum(dim=0)
            total = agreed / arrives.sum(dim=0).clamp_(min=1)
        values = rounded(terms.before.double() + total, terms.before.dtype)
        same = total == 0.0
        values[same] = terms.before[same]
        only = arrives & (self.factors == 1.0)[:, None] & (arrives.sum(dim=0) == 1)
        for row, copied in zip(terms.after, only, strict=True):
            values[copied] = row[copied]
        if not bool((values.isfinite() | same | only.any(dim=0)).all()):
            raise ParamsError(
                f"tensor '{name}': {self.method} gives values that {dtype_name(values.dtype)} cannot hold; "
                "lower the weights, or leave out the delta that is not finite"
            )
        if terms.at is None:
            return None, values
        return terms.at[stays], values[stays]

    def _buffers(self, policy: Buffers) -> dict[str, Tensor]:
        """Choose the result's buffers."""
        if policy == "base":
            return {
                name: buffer.detach().to("cpu", copy=True)
                for name, buffer in Target(self.base, self.lead.layout, self.lead.buffers).buffers.items()
            }
        if policy != "equal":
            _check_number("buffers", policy, self.deltas)
            return self.deltas[policy].buffers
        for number, delta in enumerate(self.deltas):
            for name in sorted(delta.buffers.keys() | self.lead.buffers.keys()):
                mine, wanted = delta.buffers.get(name), self.lead.buffers.get(name)
                if mine is None or wanted is None or not same_bits(mine, wanted):
                    raise MismatchError(
                        f"buffer '{name}' differs in deltas {number} and {self.head or 0}, and buffers are never "
                        "averaged; choose the delta whose to take (buffers=N), or the base's (buffers=base)"
                    )
        return self.lead.buffers


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 to a float dtype once, to nearest, ties to even.

    torch converts to 16-bit dtypes by way of float32, which rounds twice. Rounding to odd on that way (truncate,
    then set the last bit where anything was cut off) makes the second rounding the right one.

    Returns:
        A new tensor.
    """
    if dtype in (torch.float32, torch.float64):
        return values.to(dtype, copy=True)
    single = values.to(torch.float32)
    bits = single.view(torch.int32)
    wide = single.double()
    bits -= (wide.abs() > values.abs()).int()  # the magnitude's next lower neighbour, whatever the sign
    bits |= ((wide != values) & ~values.isnan()).int()
    return single.to(dtype)


def _check_number(what: str, number: int, deltas: Sequence[Delta]) -> None:
    if type(number) is not int or not 0 <= number < len(deltas):
        raise ParamsError(f"{what}={number}: expected the number of a delta, 0..{len(deltas) - 1}")
