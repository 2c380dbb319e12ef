"""One base in memory and many deltas: switch between the trained models that they stand for in milliseconds."""

from collections.abc import Mapping
from typing import Generic, TypeVar

import torch
from torch import nn

from pipeline.deltas import swap
from pipeline.deltas.base import Base, Undo
from pipeline.deltas.delta import Delta
from pipeline.deltas.origin import decode_
from pipeline.deltas.target import Layout, Model, Target, persistent_buffers
from pipeline.errors import MismatchError, ParamsError
from pipeline.masks.mask import Mask
from pipeline.parameters import ParameterIndex, digest_of_digests

M = TypeVar("M", bound=Model)


class Variants(Generic[M]):
    """A model that becomes any of several trained ones, or its base again, in place and bit for bit.

    Every delta is verified against the base once, here; a switch then verifies and writes the values and buffers
    of the two deltas only, all or nothing. Nothing drifts, since values are overwritten.

    Args:
        model: the base: a module, plain or wrapped, or a state dict, which is overwritten in place; on any device.
        deltas: name -> delta of this base. The values of thin files are decoded.

    Attributes:
        model: the model, for now the base.
        active: the name in use; None for the base.

    Raises:
        MismatchError: if a delta is of another model or base; names it.
        ParamsError: if a state dict is given without a delta.
    """

    def __init__(self, model: M, deltas: Mapping[str, Delta]) -> None:
        self.model = model
        self.active: str | None = None
        if isinstance(model, nn.Module):
            base = Target(model, Layout.of(model), persistent_buffers(model))
        else:  # which of its tensors are parameters, and which are tied, only a delta tells
            lead = next(iter(deltas.values()), None)
            if lead is None:
                raise ParamsError("a state dict has no variants without a delta; give one, or a module")
            base = Target(model, lead.layout, lead.buffers)
        digests = base.digests()
        for name, delta in deltas.items():
            try:
                target = Target(model, delta.layout, delta.buffers)
            except MismatchError as error:
                raise MismatchError(f"delta '{name}': {error}") from None
            if delta.layout != base.layout or delta.buffers.keys() != base.buffers.keys():
                raise MismatchError(f"delta '{name}' is of another model: it lacks a tensor or buffer of this one")
            if not delta.known.is_of(digests, delta.whole):
                raise MismatchError(f"delta '{name}': {delta.known.difference(digests, delta.whole)}")
            decode_(delta, target.read)
        index = ParameterIndex({n: shape for n, (_, shape) in base.layout.parameters.items()})
        nothing = {name: torch.empty(0, dtype=base.layout.parameters[name][0]) for name in index}
        known, buffers = Base(digest_of_digests(digests)), base.copied_buffers()
        self._deltas: dict[str | None, Delta] = {name: delta for name, delta in deltas.items()}
        self._deltas[None] = Delta(Mask(index, {}), nothing, buffers, known, base.layout)
        self._deltas[None].remember(base, Undo(nothing, buffers))

    def __contains__(self, name: object) -> bool:
        return name in self._deltas

    def use(self, name: str | None) -> M:
        """Become a variant.

        Args:
            name: of the delta; None for the base.

        Returns:
            The model.

        Raises:
            ParamsError: if there is no such delta.
            MismatchError: if the model was changed since the last switch; nothing is written.
        """  # noqa: DOC502 - the second is raised by what it calls
        if name not in self._deltas:
            known = ", ".join(str(key) for key in self._deltas if key is not None)
            raise ParamsError(f"there is no variant '{name}'; there are: {known}")
        old, new = self._deltas[self.active], self._deltas[name]
        swap.exchange_(Target(self.model, old.layout, new.buffers), old, new)
        self.active = name
        return self.model
