"""Taking a delta of a trained model, against the base it was trained from."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from pipeline.deltas.base import Base
from pipeline.deltas.target import Layout, Model, Target, persistent_buffers, same_bits
from pipeline.errors import MismatchError, ParamsError
from pipeline.masks.mask import Mask
from pipeline.training.masked import fitting_parameters


def parts_of(
    model: nn.Module, mask: Mask, base: str | Base | Model, keep_base: bool
) -> tuple[dict[str, Any], dict[str, Any], Base, Layout]:
    """Take what a delta is made of; see ``Delta.of``.

    Returns:
        Values, buffers, what is known of the base, and the layout.

    Raises:
        MismatchError: if the mask is of another model, or the model differs from the base outside the mask.
        ParamsError: if ``keep_base`` is asked for and the base's values are not given.
    """
    fitting_parameters(model, mask)
    trained = Target(model, Layout.of(model), persistent_buffers(model))
    layout, buffers = trained.layout, trained.copied_buffers()
    values = {name: trained.read(name, mask.at(name)) for name in mask.index}
    if isinstance(base, str):
        known = Base(base)
    elif isinstance(base, Base):
        known = base
    else:
        source = Target(base, layout, buffers if keep_base else {})
        known = Base.seen(source, mask, source.digests())
        for name, tensor in source.parameters.items():
            chosen = name in mask.index
            if chosen and mask.whole(name):
                continue
            before = (known.values or {}).get(name)
            if not same_bits(trained.changed(name, mask.at(name) if chosen else None, before), tensor):
                raise MismatchError(
                    f"tensor '{name}' of the trained model differs from the base outside the mask; "
                    "give the base and the mask that it was trained with"
                )
    if not keep_base:
        return values, buffers, replace(known, values=None, buffers={}), layout
    if known.values is None:
        raise ParamsError("keep_base=True needs the base model itself; a digest was given")
    return values, buffers, known, layout


def seen_base(
    known: Base, base: Base | Model, layout: Layout, mask: Mask, buffers: Mapping[str, Tensor]
) -> tuple[Base, bool]:
    """Take what a mask needs of a base, checking that it is the one a delta knows.

    Args:
        known: what the delta knows.
        base: what is given.
        layout: the delta's.
        mask: the delta's.
        buffers: the delta's, where the base's are wanted too.

    Returns:
        The base with its values, and whether the delta's digest covers the tensors that the mask covers whole.

    Raises:
        MismatchError: if it is not the delta's base.
        ParamsError: if it holds no values.
    """
    whole = mask.whole_tensors
    if isinstance(base, Base):
        if base.digest != known.digest:
            raise MismatchError(
                f"the base given is not the delta's base: expected {known.digest[:12]}, found {base.digest[:12]}"
            )
        if base.values is None or {n: v.numel() for n, v in base.values.items()} != {
            n: mask.count(n) for n in mask.index
        }:
            raise ParamsError(
                "the base given does not hold the values at this mask; take it with Base.of(model, mask)"
            )
        return base, not whole
    source = Target(base, layout, buffers)
    digests = source.digests()
    if not known.is_of(digests, whole):
        raise MismatchError(known.difference(digests, whole))
    return Base.seen(source, mask, digests), known.is_of(digests, ())
