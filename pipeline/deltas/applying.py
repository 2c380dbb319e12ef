"""Applying a delta to its base in place, and taking it out again: verified first, all or nothing."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from pipeline.deltas.base import Undo
from pipeline.deltas.target import Model, Target, Write, same_bits, write_all
from pipeline.errors import MismatchError

if TYPE_CHECKING:
    from pipeline.deltas.delta import Delta


def apply_(delta: "Delta", model: Model) -> None:
    """Turn the base into the trained model; see ``Delta.apply_``.

    Raises:
        MismatchError: if the model is not the base.
    """
    target = Target(model, delta.layout, delta.buffers)
    digests = target.digests()
    if not delta.known.is_of(digests, delta.whole):
        if delta.thin is not None or unlike(delta, target) is not None:
            raise MismatchError(delta.known.difference(digests, delta.whole))
        undo = delta.undo_for(target)
        if undo is None or not delta.known.is_of(_reverted(delta, target, undo), delta.whole):
            raise MismatchError("the model holds this delta's values already; apply it to its base")
        return
    undo = Undo({name: target.read(name, delta.at(name)) for name in delta.mask.index}, target.copied_buffers())
    delta.fill_(undo.values)
    write_all(_writes(delta, target, delta.values, delta.buffers))
    delta.remember(target, undo)


def revert_(delta: "Delta", model: Model) -> None:
    """Turn the trained model back into the base; see ``Delta.revert_``.

    Raises:
        MismatchError: if the model does not hold the delta, or the base's values are not known.
    """
    target = Target(model, delta.layout, delta.buffers)
    undo = delta.undo_for(target)
    if undo is None:
        raise MismatchError(
            "the base's values are not known: this delta was not applied to this model here, and was taken "
            "without keep_base=True; load the base instead"
        )
    check_held(delta, target)
    digests = _reverted(delta, target, undo)
    if not delta.known.is_of(digests, delta.whole):
        raise MismatchError(f"with the delta taken out, {delta.known.difference(digests, delta.whole)}")
    write_all(_writes(delta, target, undo.values, undo.buffers))
    delta.remember(target, None)


def check_held(delta: "Delta", target: Target) -> None:
    """Check that a model holds the delta's values and buffers.

    Raises:
        MismatchError: if it does not; names the first tensor.
    """
    found = unlike(delta, target)
    if found is not None:
        raise MismatchError(f"{found} does not hold this delta's values: the model is not base + delta")


def unlike(delta: "Delta", target: Target) -> str | None:
    """Name the first tensor or buffer that does not hold the delta's values.

    Returns:
        Its name; None where all do.
    """
    for name, values in delta.values.items():
        if values.numel() and not same_bits(target.read(name, delta.at(name)), values):
            return f"tensor '{name}'"
    for name, buffer in delta.buffers.items():
        if not same_bits(target.buffers[name], buffer):
            return f"buffer '{name}'"
    return None


def _reverted(delta: "Delta", target: Target, undo: Undo) -> dict[str, str]:
    """Digests of the parameters as they would be with ``undo`` written."""
    return target.digests({name: (delta.at(name), v) for name, v in undo.values.items() if v.numel()})


def _writes(
    delta: "Delta", target: Target, values: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> list[Write]:
    writes = [w for name, v in values.items() if v.numel() for w in target.writes(name, delta.at(name), v)]
    return writes + target.buffer_writes(buffers)
