"""Delta: the target values of a trained model at its mask; exact apply, revert and swap.

Values are the trained ones themselves, not differences: adding and subtracting rounds (in bf16 one merge and
unmerge by ± changed 16.9 % of the weights, trl issue 6688), overwriting does not. Source: DESIGN, "Delta".
"""

from collections.abc import Mapping
from functools import cached_property
from hashlib import blake2b
from os import PathLike
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from pipeline import files
from pipeline.deltas import format, swap
from pipeline.deltas.base import SHORT, Base, Undo
from pipeline.deltas.target import Layout, Model, Target, Write, persistent_buffers, same_bits, write_all
from pipeline.errors import MismatchError, ParamsError
from pipeline.masks.mask import Mask
from pipeline.parameters import digest_of_digests, tensor_digest
from pipeline.training.masked import fitting_parameters


class Delta:
    """A trained model as what its base must be overwritten with: values at a mask's coordinates, and buffers.

    Every persistent buffer (BatchNorm's running statistics and integer counters) is stored whole and written by
    ``apply_``. Buffers are no part of the base's digest, so a base with other statistics is accepted; ``revert_``
    brings back what it held.

    Build one with ``Delta.of`` or ``Delta.load``.

    Attributes:
        mask: the coordinates.
        values: name -> [count], in the model's dtype, on the CPU; an entry for every tensor of the mask's index.
        buffers: name -> buffer, on the CPU.
        known: what is known of the base.
        layout: names, dtypes and shapes of all parameters, frozen ones included.
        info: provenance (JSON-able); no part of the digest.
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
        layout = Layout.of(model)
        buffers = _copies(persistent_buffers(model))
        trained = Target(model, layout, buffers)
        at = {name: None if mask.whole(name) else mask.indices[name] for name in mask.index}
        values = {name: trained.read(name, at[name]) for name in mask.index}
        if isinstance(base, str):
            if keep_base:
                raise ParamsError("keep_base=True needs the base model itself; a digest was given")
            return cls(mask, values, buffers, Base(base), layout, info)
        source = Target(base, layout, buffers if keep_base else {})
        before = {name: source.read(name, at[name]) for name in mask.index}
        for name, tensor in source.parameters.items():
            whole = name in at and at[name] is None
            if not whole and not same_bits(trained.changed(name, at.get(name), before.get(name)), tensor):
                raise MismatchError(
                    f"tensor '{name}' of the trained model differs from the base outside the mask; "
                    "give the base and the mask that it was trained with"
                )
        digests = source.digests()
        digest = digest_of_digests(digests, without=[name for name in at if at[name] is None])
        tensors = {name: found[:SHORT] for name, found in digests.items()}
        known = Base(digest, before if keep_base else None, _copies(source.buffers), tensors)
        return cls(mask, values, buffers, known, layout, info)

    def with_base(self, base: Model) -> "Delta":
        """Add the base's values to a delta that was taken without them, so that it can be reverted.

        Args:
            base: the base: a module or its state dict, buffers included.

        Returns:
            A delta of the same digest that keeps them.

        Raises:
            MismatchError: if it is not the base.
        """
        source = Target(base, self.layout, self.buffers)
        digests = source.digests()
        if not self.known.is_of(digests, self._whole):
            raise MismatchError(self.known.difference(digests, self._whole))
        values = {name: source.read(name, self.at(name)) for name in self.mask.index}
        tensors = {name: found[:SHORT] for name, found in digests.items()}
        known = Base(self.base, values, _copies(source.buffers), tensors)
        return Delta(self.mask, self.values, self.buffers, known, self.layout, self.info)

    @property
    def base(self) -> str:
        """The digest of the base."""
        return self.known.digest

    @property
    def nbytes(self) -> int:
        """Bytes of values and buffers in memory, without coordinates and without the base's."""
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
        if not self.known.is_of(digests, self._whole):
            if self._unlike(target) is not None:
                raise MismatchError(self.known.difference(digests, self._whole))
            undo = self.undo_for(target)
            if undo is None or not self.known.is_of(self._reverted(target, undo), self._whole):
                raise MismatchError("the model holds this delta's values already; apply it to its base")
            return
        undo = Undo({name: target.read(name, self.at(name)) for name in self.values}, _copies(target.buffers))
        write_all(self._writes(target, self.values, self.buffers))
        self.remember(target, undo)

    def revert_(self, model: Model) -> None:
        """Turn the trained model back into the base, bit for bit, all or nothing.

        The base's values come from the earlier ``apply_`` or ``swap_`` on this module or dict, else from the delta
        itself where it was taken with ``keep_base``. The result is checked to be the base before the first write.

        Args:
            model: as in ``apply_``.

        Raises:
            MismatchError: if the model does not hold this delta's values, its frozen part is not the base's, or
                the base's values are not known.
        """
        target = Target(model, self.layout, self.buffers)
        undo = self.undo_for(target)
        if undo is None:
            raise MismatchError(
                "the base's values are not known: this delta was not applied to this model here, and was taken "
                "without keep_base=True; load the base instead"
            )
        self.check_held(target)
        digests = self._reverted(target, undo)
        if not self.known.is_of(digests, self._whole):
            raise MismatchError(f"with the delta taken out, {self.known.difference(digests, self._whole)}")
        write_all(self._writes(target, undo.values, undo.buffers))
        self.remember(target, None)

    @staticmethod
    def swap_(model: Model, a: "Delta", b: "Delta") -> None:
        """Turn base + ``a`` into base + ``b``, bit for bit, all or nothing, in O(k): frozen values are not read.

        The model must hold ``a``, and both deltas must have the same base; a MismatchError says which is not so,
        before anything is written.

        Args:
            model: as in ``apply_``.
            a: the delta to take out. Its base's values must be known where ``b`` has no coordinate.
            b: the delta to put in.
        """
        swap.swap_(model, a, b)

    def norms(self) -> dict[str, float]:
        """Measure the change of each tensor that has coordinates: ‖trained - base‖₂, summed in float64.

        Returns:
            name -> norm; empty where the delta keeps no base values.
        """
        base = self.known.values
        if base is None:
            return {}
        return {n: float((v.double() - base[n].double()).norm()) for n, v in self.values.items() if v.numel()}

    def summary(self) -> list[dict[str, Any]]:
        """Describe the delta tensor by tensor, in flat order.

        Returns:
            Rows of ``name``, ``count`` (trained values), ``size`` (all), ``density`` (their ratio) and ``norm``
            (L2 norm of trained - base; None where the base's values are not kept or there are no coordinates).
        """
        norms, rows = self.norms(), []
        for name in self.mask.index:
            count, size = self.mask.count(name), self.mask.index.numel(name)
            density = count / max(size, 1)
            rows.append({"name": name, "count": count, "size": size, "density": density, "norm": norms.get(name)})
        return rows

    def save(self, path: str | PathLike[str]) -> int:
        """Write the delta to a file, atomically.

        Returns:
            The bytes written.
        """
        meta, sections = format.encode(self)
        return files.write_file(path, format=format.FORMAT, version=format.VERSION, meta=meta, sections=sections)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Delta":
        """Read a delta; every checksum, count and dtype is verified before it is returned.

        A file that is no sound delta is refused with an ArtifactError that names it and the reason.

        Returns:
            The delta.
        """
        meta, sections = files.read_file(path, format=format.FORMAT, version=format.VERSION)
        return format.checked(path, cls, meta, sections)

    def at(self, name: str) -> Tensor | None:
        """Find the coordinates of a tensor.

        Returns:
            int64 [count]; None for all of them.
        """
        return None if self.mask.whole(name) else self.mask.indices[name]

    def undo_for(self, target: Target) -> Undo | None:
        """Find what was overwritten on this very model, else what the delta keeps of its base.

        Returns:
            The base's values; None where not known.
        """
        remembered: Undo | None = self._overwritten.get(target.anchor)
        if remembered is None and self.known.values is not None:
            return Undo(self.known.values, self.known.buffers)
        return remembered

    def remember(self, target: Target, undo: Undo | None) -> None:
        """Remember what the delta overwrote on this model, for as long as the model lives; None forgets it."""
        if undo is None:
            self._overwritten.pop(target.anchor, None)
        else:
            self._overwritten[target.anchor] = undo

    def check_held(self, target: Target) -> None:
        """Check that a model holds the delta's values and buffers.

        Raises:
            MismatchError: if it does not; names the first tensor.
        """
        unlike = self._unlike(target)
        if unlike is not None:
            raise MismatchError(f"{unlike} does not hold this delta's values: the model is not base + delta")

    @cached_property
    def _whole(self) -> list[str]:
        """Names of the tensors that the mask covers whole."""
        return [name for name in self.mask.index if self.mask.whole(name)]

    def _unlike(self, target: Target) -> str | None:
        """Name the first tensor or buffer that does not hold the delta's values."""
        for name, values in self.values.items():
            if values.numel() and not same_bits(target.read(name, self.at(name)), values):
                return f"tensor '{name}'"
        for name, buffer in self.buffers.items():
            if not same_bits(target.buffers[name], buffer):
                return f"buffer '{name}'"
        return None

    def _reverted(self, target: Target, undo: Undo) -> dict[str, str]:
        """Digests of the parameters as they would be with ``undo`` written."""
        return target.digests({name: (self.at(name), v) for name, v in undo.values.items() if v.numel()})

    def _writes(self, target: Target, values: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> list[Write]:
        writes = [w for name, v in values.items() if v.numel() for w in target.writes(name, self.at(name), v)]
        return writes + target.buffer_writes(buffers)


def _copies(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: buffer.detach().to("cpu", copy=True) for name, buffer in buffers.items()}
