"""Delta: the target values of a trained model at its mask; exact apply, revert and swap.

Values are the trained ones themselves, not differences: adding and subtracting rounds (in bf16 one merge and
unmerge by ± changed 16.9 % of the weights, trl issue 6688), overwriting does not. Source: DESIGN, "Delta".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from pipeline import files
from pipeline.deltas.target import (
    Layout,
    Model,
    Target,
    Write,
    dtype_name,
    persistent_buffers,
    same_bits,
    write_all,
)
from pipeline.errors import MismatchError, ParamsError
from pipeline.masks.mask import Mask
from pipeline.parameters import digest_of_digests, tensor_digest
from pipeline.training.masked import fitting_parameters


@dataclass(frozen=True)
class Base:
    """What is known of the base a delta belongs to.

    Attributes:
        digest: ``base_digest`` of it, of all parameters or of those that the mask does not cover whole.
        values: its values at the mask, name -> [count]; None where not kept.
        buffers: its buffers; empty where not kept.
        tensors: name -> the first 16 hex digits of the tensor's digest, where the base was at hand. They name the
            tensor in which a wrong base differs, and tell that two deltas share a base although their masks cover
            different tensors whole.
    """

    digest: str
    values: dict[str, Tensor] | None
    buffers: dict[str, Tensor]
    tensors: dict[str, str]


class Delta:
    """A trained model as its difference in place: the values at a mask's coordinates, and the buffers.

    Buffers: every persistent buffer (BatchNorm's running statistics and counters) is stored whole and written by
    ``apply_``; they are no part of the base's digest, so a base with other statistics is accepted, and what it
    held comes back with ``revert_``.

    Build one with ``Delta.of`` or ``Delta.load``.

    Attributes:
        mask: the coordinates.
        values: name -> [count], in the model's dtype, on the CPU; an entry for every tensor of the mask's index.
        buffers: name -> buffer, on the CPU.
        info: provenance (JSON-able); no part of the digest.
        layout: names, dtypes and shapes of all parameters, frozen ones included.
        known: what is known of the base.
    """

    def __init__(
        self,
        mask: Mask,
        values: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        known: Base,
        layout: Layout,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        self.mask = mask
        self.values = dict(values)
        self.buffers = dict(buffers)
        self.known = known
        self.layout = layout
        self.info: dict[str, Any] = files.plain_json(info or {}, "info of a delta")
        self._overwritten: WeakIdKeyDictionary = WeakIdKeyDictionary()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        mask: Mask,
        *,
        base: str | Model,
        keep_base: bool | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> "Delta":
        """Take the delta of a trained model.

        Args:
            model: the trained model.
            mask: the coordinates that were trained.
            base: the digest of the model it was trained from (``base_digest``, of all parameters or
                ``without`` those that the mask covers whole), or that model itself: a module or its state dict.
                Given the model, everything outside the mask is checked to be untouched, and tensors that the mask
                covers whole are left out of the digest, so that a freshly drawn head does not matter.
            keep_base: store the base's values too (as many bytes again), so that a loaded delta can be reverted.
            info: provenance.

        Returns:
            The delta, its values copied to the CPU.

        Raises:
            MismatchError: if the mask is of another model, or the model differs from the base outside the mask.
            ParamsError: if ``keep_base`` is asked for with a digest only.
        """
        fitting_parameters(model, mask)
        buffers = {name: b.detach().to("cpu", copy=True) for name, b in persistent_buffers(model).items()}
        layout = Layout.of(model)
        trained = Target(model, layout, buffers)
        values = {name: trained.read(name, _at(mask, name)) for name in mask.index}
        if isinstance(base, str):
            if keep_base:
                raise ParamsError("keep_base=True needs the base model itself; a digest was given")
            return cls(mask, values, buffers, Base(base, None, {}, {}), layout, info)
        source = Target(base, layout, buffers if keep_base else {})
        before = {name: source.read(name, _at(mask, name)) for name in mask.index}
        digests = source.digests()
        for name in layout.parameters:
            at = _at(mask, name) if name in mask.index else _NOWHERE
            if at is not None and trained.digest_with(name, at, before.get(name, _NOTHING)) != digests[name]:
                raise MismatchError(f"tensor '{name}' of the trained model differs from the base outside the mask")
        known = Base(
            digest_of_digests(digests, without=_whole(mask)),
            before if keep_base else None,
            {name: b.detach().to("cpu", copy=True) for name, b in source.buffers.items()},
            {name: digest[:16] for name, digest in digests.items()},
        )
        return cls(mask, values, buffers, known, layout, info)

    @property
    def base(self) -> str:
        """The digest of the base."""
        return self.known.digest

    @property
    def nbytes(self) -> int:
        """Bytes of the values and buffers in memory, without coordinates and without the base's."""
        return sum(t.numel() * t.element_size() for t in (*self.values.values(), *self.buffers.values()))

    @cached_property
    def digest(self) -> str:
        """BLAKE2b-256 (hex) of mask, base, values and buffers; of neither file, coder, kept base nor info."""
        state = blake2b(f"mask {self.mask.digest}\nbase {self.base}\n".encode(), digest_size=32)
        for kind, tensors in (("values", self.values), ("buffer", self.buffers)):
            for name in sorted(tensors):
                state.update(f"{kind} {name} {tensor_digest(tensors[name])}\n".encode())
        return state.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Delta) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Delta({self.mask.nnz} of {self.mask.index.total} values, {self.nbytes} bytes, {self.digest[:12]})"

    def apply_(self, model: Model) -> None:
        """Turn the base into the trained model, bit for bit, all or nothing.

        Everything is checked before the first write: names, shapes, dtypes and the digest of the base. The values
        overwritten are remembered, so that ``revert_`` on the same module or dict needs no base. A model that
        holds the delta already is left as it is where the base's values are known (kept, or remembered from an
        earlier apply), and refused where they are not, since its frozen part cannot be verified.

        Args:
            model: a module (plain, compiled, data-parallel) or a state dict, on any device. A state dict is
                overwritten in place, tied weights under all of their names.

        Raises:
            MismatchError: if the model is not the base.
        """
        target = Target(model, self.layout, self.buffers)
        digests = target.digests()
        if not self._is_base(digests):
            undo = self._undo(target)
            if not self._holds(target):
                raise MismatchError(self._difference(digests))
            if undo is None or not self._is_base(self._before(target, undo, digests)):
                raise MismatchError("the model holds this delta's values already; apply it to its base")
            return
        before = Undo({n: target.read(n, _at(self.mask, n)) for n in self.values}, _copied(target.buffers))
        write_all(self._writes(target, self.values, self.buffers))
        self._overwritten[target.anchor] = before

    def revert_(self, model: Model) -> None:
        """Turn the trained model back into the base, bit for bit, all or nothing.

        The base's values come from the earlier ``apply_`` or ``swap_`` on this module or dict, else from the delta
        itself where it was taken with ``keep_base``.

        Args:
            model: as in ``apply_``.

        Raises:
            MismatchError: if the model does not hold this delta's values, its frozen part is not the base's, or
                the base's values are not known.
        """
        target = Target(model, self.layout, self.buffers)
        undo = self._undo(target)
        if undo is None:
            raise MismatchError(
                "the base's values are not known: this delta was not applied to this model here, and was taken "
                "without keep_base=True; load the base instead"
            )
        self._check_held(target)
        digests = self._before(target, undo, target.digests())
        if not self._is_base(digests):
            raise MismatchError(f"without the delta this model is not its base: {self._difference(digests)}")
        write_all(self._writes(target, undo.values, undo.buffers))
        self._overwritten.pop(target.anchor, None)

    @staticmethod
    def swap_(model: Model, a: "Delta", b: "Delta") -> None:
        """Turn base + ``a`` into base + ``b``, bit for bit, all or nothing, in O(k): frozen values are not read.

        Args:
            model: as in ``apply_``; holds ``a``.
            a: the delta to take out. Its base's values must be known where ``b`` has no coordinate.
            b: the delta to put in; of the same base.

        Raises:
            MismatchError: if the model does not hold ``a``, the bases differ, or base values are missing.
        """
        if a.layout != b.layout or a.buffers.keys() != b.buffers.keys():
            raise MismatchError("the two deltas are of different models")
        target = Target(model, a.layout, b.buffers)
        undo = a._undo(target)
        if not _same_base(a, b, undo):
            raise MismatchError("the two deltas are of different bases; revert the first, then apply the second")
        a._check_held(target)
        writes: list[Write] = []
        before: dict[str, Tensor] = {}
        for name in b.mask.index:
            old, new = a.mask.indices[name], b.mask.indices[name]
            before[name] = target.read(name, _at(b.mask, name))
            if undo is not None:
                shared, place = _locate(new, old)
                before[name][shared] = undo.values[name][place]
            left = torch.ones(old.numel(), dtype=torch.bool)
            left[_locate(new, old)[1]] = False
            if bool(left.any()):
                if undo is None:
                    raise MismatchError(
                        f"the base's values of tensor '{name}' are not known, and the second delta does not cover "
                        "all of the first; take the first with keep_base=True, or apply it here"
                    )
                writes += target.writes(name, old[left], undo.values[name][left])
            if new.numel():
                writes += target.writes(name, _at(b.mask, name), b.values[name])
        write_all([*writes, *target.buffer_writes(b.buffers)])
        a._overwritten.pop(target.anchor, None)
        if undo is not None:
            b._overwritten[target.anchor] = Undo(before, undo.buffers)

    def summary(self) -> list[dict[str, Any]]:
        """Describe the delta tensor by tensor, in flat order.

        Returns:
            Rows of ``name``, ``count`` (trained values), ``size`` (all), ``density`` (their ratio) and ``norm``
            (L2 norm of trained - base values; None where the delta keeps no base values).
        """
        norms = self.norms()
        sizes = {name: self.mask.index.numel(name) for name in self.values}
        return [
            {
                "name": name,
                "count": values.numel(),
                "size": sizes[name],
                "density": values.numel() / max(sizes[name], 1),
                "norm": norms.get(name),
            }
            for name, values in self.values.items()
        ]

    def norms(self) -> dict[str, float]:
        """Measure the change of each tensor that has coordinates: ‖trained - base‖₂, summed in float64.

        Returns:
            name -> norm; empty where the delta keeps no base values.
        """
        base = self.known.values
        if base is None:
            return {}
        return {n: float((v.double() - base[n].double()).norm()) for n, v in self.values.items() if v.numel()}

    def save(self, path: str | PathLike[str]) -> int:
        """Write the delta to a file, atomically.

        Returns:
            The bytes written.
        """
        from pipeline.deltas.format import write_delta  # the format reads and makes Deltas

        return write_delta(self, path)

    @staticmethod
    def load(path: str | PathLike[str]) -> "Delta":
        """Read a delta; every checksum, count and dtype is verified before it is returned.

        Returns:
            The delta.
        """
        from pipeline.deltas.format import read_delta

        return read_delta(path)

    def _is_base(self, digests: Mapping[str, str]) -> bool:
        """Tell whether tensors of these digests are the base, with or without those the mask covers whole."""
        return self.base in (digest_of_digests(digests), digest_of_digests(digests, without=_whole(self.mask)))

    def _holds(self, target: Target) -> bool:
        return self._unlike(target) is None

    def _unlike(self, target: Target) -> str | None:
        """Name the first tensor or buffer that does not hold the delta's values."""
        for name, values in self.values.items():
            if values.numel() and not same_bits(target.read(name, _at(self.mask, name)), values):
                return f"tensor '{name}'"
        for name, buffer in self.buffers.items():
            if not same_bits(target.buffers[name], buffer):
                return f"buffer '{name}'"
        return None

    def _check_held(self, target: Target) -> None:
        unlike = self._unlike(target)
        if unlike is not None:
            raise MismatchError(f"{unlike} does not hold this delta's values; the model is not base + delta")

    def _undo(self, target: Target) -> "Undo | None":
        """What was overwritten on this very model, else what the delta keeps of its base."""
        remembered: Undo | None = self._overwritten.get(target.anchor)
        if remembered is None and self.known.values is not None:
            return Undo(self.known.values, self.known.buffers)
        return remembered

    def _before(self, target: Target, undo: "Undo", digests: Mapping[str, str]) -> dict[str, str]:
        """Digests of the parameters as they would be with ``undo`` written."""
        return {
            name: target.digest_with(name, _at(self.mask, name), undo.values[name])
            if name in undo.values and undo.values[name].numel()
            else digest
            for name, digest in digests.items()
        }

    def _writes(self, target: Target, values: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> list[Write]:
        writes = [w for n, v in values.items() if v.numel() for w in target.writes(n, _at(self.mask, n), v)]
        return writes + target.buffer_writes(buffers)

    def _difference(self, digests: Mapping[str, str]) -> str:
        """Say in which tensors a model is not the base, as far as the delta can tell."""
        whole = set(_whole(self.mask))
        known = self.known.tensors
        wrong = [n for n, d in digests.items() if n in known and n not in whole and known[n] != d[:16]]
        where = f"tensor '{wrong[0]}' differs ({len(wrong)} of {len(digests)} do); " if wrong else ""
        found = digest_of_digests(digests, without=whole)
        return f"{where}expected the base {self.base[:12]}, found {found[:12]}; load the base the delta was trained from"


@dataclass(frozen=True)
class Undo:
    """What a write replaced: name -> values [count], and buffers whole."""

    values: dict[str, Tensor]
    buffers: dict[str, Tensor]


_NOWHERE = torch.empty(0, dtype=torch.int64)
_NOTHING = torch.empty(0)


def _at(mask: Mask, name: str) -> Tensor | None:
    """The coordinates of a tensor; None for all of them."""
    return None if mask.whole(name) else mask.indices[name]


def _whole(mask: Mask) -> list[str]:
    """Names of the tensors that a mask covers whole."""
    return [name for name in mask.index if mask.whole(name)]


def _copied(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: b.detach().to("cpu", copy=True) for name, b in buffers.items()}


def _locate(some: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Match two sorted coordinate vectors: positions of the shared ones in ``some``, and in ``others``."""
    if not some.numel() or not others.numel():
        return _NOWHERE, _NOWHERE
    place = torch.searchsorted(others, some).clamp_(max=others.numel() - 1)
    shared = (others[place] == some).nonzero().reshape(-1)
    return shared, place[shared]


def _same_base(a: Delta, b: Delta, undo: Undo | None) -> bool:
    """Tell whether base + b can be reached from base + a: every tensor that b does not replace whole is as b's."""
    if a.base == b.base:
        return True
    for name, (dtype, shape) in b.layout.parameters.items():
        if name in b.mask.index and b.mask.whole(name):
            continue
        have = a.known.tensors.get(name)
        if name in a.mask.index and a.mask.whole(name):  # a does not say what was there, the undo does
            have = tensor_digest(undo.values[name].to(dtype).reshape(shape))[:16] if undo else None
        if have is None or have != b.known.tensors.get(name):
            return False
    return True
