"""Delta: the target values of a trained model at its mask; exact apply, revert and swap.

Values are the trained ones themselves, not differences: adding and subtracting rounds (in bf16 one merge and
unmerge by ± changed 16.9 % of the weights, trl issue 6688), overwriting does not. Source: DESIGN, "Delta".
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from os import PathLike
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from pipeline import files
from pipeline.deltas import applying, format, swap
from pipeline.deltas.base import Base, Undo
from pipeline.deltas.taking import parts_of, seen_base
from pipeline.deltas.target import Layout, Model, Target
from pipeline.deltas.thin import Thin, content_digest
from pipeline.errors import MismatchError
from pipeline.masks.mask import Mask


class Delta:
    """A trained model as what its base must be overwritten with: values at a mask's coordinates, and buffers.

    Every persistent buffer (BatchNorm's running statistics and integer counters) is stored whole and written by
    ``apply_``. Buffers are no part of the base's digest, so a base with other statistics is accepted; ``revert_``
    brings back what it held.

    Build one with ``Delta.of`` or ``Delta.load``. One loaded from a *thin* file (see ``save``) has everything but
    its values; they are decoded when the base is met: by ``apply_``, by ``swap_``, or by ``resolve``.

    ``info`` holds the provenance. Standard keys, each where it is known: ``task``, ``method``, ``setting``;
    ``model`` and ``revision`` (the base's source); ``data`` (digest of the data); ``seed``; ``parent`` (digest of
    the mask that was trained, or of what else this one was made from; ``parents`` where several); ``fishmask``
    (the code's version). The base's digest is the delta's ``base``; how the mask was chosen, ``mask.info`` tells.

    Attributes:
        mask: the coordinates.
        buffers: name -> buffer, on the CPU.
        known: what is known of the base.
        layout: names, dtypes and shapes of all parameters, frozen ones included.
        info: provenance (JSON-able); no part of the digest.
        thin: the values as a thin file holds them, until the base is met; else None.
    """

    def __init__(
        self,
        mask: Mask,
        values: Mapping[str, Tensor] | Thin,
        buffers: Mapping[str, Tensor],
        known: Base,
        layout: Layout,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        self.mask = mask
        self.thin = values if isinstance(values, Thin) else None
        self._values = {} if isinstance(values, Thin) else dict(values)
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
        base: str | Base | Model,
        keep_base: bool | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> "Delta":
        """Take the delta of a trained model; a MismatchError if the mask or the base is of another model.

        Args:
            model: the trained model.
            mask: the coordinates that were trained.
            base: the model it was trained from, a module or its state dict; or ``Base.of`` that model, from before
                it was trained in place; or its digest (``base_digest``, of all parameters or ``without`` those
                that the mask covers whole). Given the model, everything outside the mask is checked to be
                untouched, and tensors that the mask covers whole are left out of the digest, so that a freshly
                drawn head does not matter.
            keep_base: store the base's values too, so that a loaded delta can be reverted; a digest does not do.
            info: provenance; the mask is its ``parent`` where it names no other.

        Returns:
            The delta, its values copied to the CPU.
        """
        values, buffers, known, layout = parts_of(model, mask, base, bool(keep_base))
        return cls(mask, values, buffers, known, layout, {"parent": mask.digest} | dict(info or {}))

    def with_base(self, base: Model) -> "Delta":
        """Add the base's values to a delta that was taken without them, so that it can be reverted.

        Args:
            base: a module or its state dict, buffers included; a MismatchError if it is not the base.

        Returns:
            A delta of the same digest that keeps them.
        """
        seen, _ = seen_base(self.known, base, self.layout, self.mask, self.buffers)
        self.fill_(seen.values)
        known = replace(seen, digest=self.base)
        return Delta(self.mask, self.values, self.buffers, known, self.layout, self.info)

    def resolve(self, base: Base | Model) -> "Delta":
        """Decode the values of a thin file; nothing to do for any other delta.

        Args:
            base: a module, its state dict, or ``Base.of`` it; a MismatchError if it is not the base.

        Returns:
            This delta.
        """
        if self.thin is not None:
            self.fill_(seen_base(self.known, base, self.layout, self.mask, {})[0].values)
        return self

    def fill_(self, before: Mapping[str, Tensor] | None) -> None:
        """Decode the values of a thin file from the base's, read by other means than ``resolve``.

        Values that do not have the delta's digest, since the file is damaged or the base another, are refused with
        an ArtifactError, and the delta stays as it was.

        Args:
            before: name -> the base's values at the mask [count], on the CPU, for the tensors that ``thin`` names.
        """
        if self.thin is not None:
            self._values = self.thin.verified(self.mask, self.base, self.buffers, before or {})
            self.thin = None

    @property
    def values(self) -> dict[str, Tensor]:
        """Name -> [count], in the model's dtype, on the CPU; an entry for every tensor of the mask's index."""
        if self.thin is not None:
            raise MismatchError(self.thin.refusal(self.base))
        return self._values

    @property
    def base(self) -> str:
        """The digest of the base."""
        return self.known.digest

    @cached_property
    def whole(self) -> list[str]:
        """Names of the tensors that the mask covers whole."""
        return self.mask.whole_tensors

    @property
    def nbytes(self) -> int:
        """Bytes of values and buffers in memory, without coordinates and without the base's."""
        values = sum(self.mask.count(n) * self.layout.parameters[n][0].itemsize for n in self.mask.index)
        return values + sum(b.nbytes for b in self.buffers.values())

    @cached_property
    def digest(self) -> str:
        """BLAKE2b-256 (hex) of mask, base, values and buffers; of neither file, coder, kept base nor info."""
        if self.thin is not None:
            return self.thin.digest
        return content_digest(self.mask, self.base, self._values, self.buffers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Delta) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Delta({self.mask.nnz} of {self.mask.index.total} values, {self.nbytes} bytes, {self.digest[:12]})"

    def apply_(self, model: Model) -> None:
        """Turn the base into the trained model, bit for bit, all or nothing.

        Everything is checked before the first write: names, shapes, dtypes and the digest of the base; a
        MismatchError where one is another. The values overwritten are remembered, so that ``revert_`` on the same
        module or dict needs no base. A model that holds the delta already is left as it is where the base's values
        are known (kept, or remembered from an earlier apply), and refused where they are not.

        Args:
            model: a module (plain, compiled, data-parallel) or a state dict, on any device. A state dict is
                overwritten in place, tied weights under all of their names.
        """
        applying.apply_(self, model)

    def revert_(self, model: Model) -> None:
        """Turn the trained model back into the base, bit for bit, all or nothing.

        The base's values come from the earlier ``apply_`` or ``swap_`` on this module or dict, else from the delta
        itself where it was taken with ``keep_base``. The result is checked to be the base before the first write.
        A MismatchError if the model does not hold this delta's values, its frozen part is not the base's, or the
        base's values are not known.

        Args:
            model: as in ``apply_``.
        """
        applying.revert_(self, model)

    @staticmethod
    def swap_(model: Model, a: "Delta", b: "Delta") -> None:
        """Turn base + ``a`` into base + ``b``, bit for bit, all or nothing, in O(k): frozen values are not read.

        The model must hold ``a``, and both deltas must have the same base; a MismatchError says which is not so,
        before anything is written.

        Args:
            model: as in ``apply_``.
            a: the delta to take out. Its base's values must be known where ``b`` has no coordinate, and where
                ``b`` is of a thin file.
            b: the delta to put in.
        """
        swap.swap_(model, a, b)

    def norms(self, before: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        """Measure the change of each tensor that has coordinates: ‖trained - base‖₂, summed in float64.

        Args:
            before: name -> the base's values at the mask [count]; None takes those that the delta keeps.

        Returns:
            name -> norm, where the base's values are known.
        """
        base = before if before is not None else self.known.values or {}
        changes = {n: self.values[n].double() - v.double() for n, v in base.items() if v.numel()}
        return {n: float(change.norm()) for n, change in changes.items()}

    def summary(self) -> list[dict[str, Any]]:
        """Describe the delta tensor by tensor, in flat order.

        Returns:
            Rows of ``name``, ``count`` (trained), ``size`` (all), ``density`` (their ratio), ``norm`` (or None).
        """
        norms = self.norms()
        sizes = [(name, self.mask.count(name), self.mask.index.numel(name)) for name in self.mask.index]
        return [
            {"name": name, "count": count, "size": size, "density": count / max(size, 1), "norm": norms.get(name)}
            for name, count, size in sizes
        ]

    def save(self, path: str | PathLike[str], *, base: Base | Model | None = None) -> int:
        """Write the delta to a file, atomically.

        Values are coded without loss (values.py), on their own or, where that is smaller, against the base's:
        those the delta keeps, which stand in the file too; else those of ``base``, which makes the file *thin*: it
        needs the base to be read. Tensors that the base's digest leaves out are never coded against a given base.

        Args:
            path: the file.
            base: a module, its state dict, or ``Base.of`` it; a MismatchError if it is not the base.

        Returns:
            The bytes written.
        """
        seen, every = self.known, False
        if base is not None:
            seen, every = seen_base(self.known, base, self.layout, self.mask, {})
            self.fill_(seen.values)
        meta, sections = format.encode(self, seen.values, every)
        return files.write_file(path, format=format.FORMAT, version=format.VERSION, meta=meta, sections=sections)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Delta":
        """Read a delta; every checksum, count and dtype is verified before it is returned.

        A file that is no sound delta is refused with an ArtifactError that names it and the reason.

        Returns:
            The delta; of a thin file, one whose values await the base.
        """
        meta, sections = files.read_file(path, format=format.FORMAT, version=format.VERSION)
        return format.checked(path, cls, meta, sections)

    def at(self, name: str) -> Tensor | None:
        """Find the coordinates of a tensor.

        Returns:
            int64 [count]; None for all of them.
        """
        return self.mask.at(name)

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
