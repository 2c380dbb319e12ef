"""The base of a delta, seen through it and verified, heads aside."""

from collections.abc import Callable

from torch import Tensor, nn

from pipeline.deltas.delta import Delta
from pipeline.deltas.target import Layout, Model, Target
from pipeline.errors import MismatchError
from pipeline.parameters import unwrapped


def origin(delta: Delta, base: Model) -> Target:
    """Verify that a model is a delta's base, but for the tensors that the delta covers whole; decode a thin delta.

    Those may be of another shape in the base, or missing: a bare encoder's checkpoint is the base of a classifier.

    Args:
        delta: the delta.
        base: a module, or its tensors by name.

    Returns:
        The base's other parameters.

    Raises:
        MismatchError: if a tensor is missing or of another form, or the digest is not the delta's base's.
    """
    free = set(delta.whole) - set(delta.thin.names if delta.thin else ())
    forms = {name: form for name, form in delta.layout.parameters.items() if name not in free}
    ties = {alias: name for alias, name in delta.layout.ties.items() if name in forms}
    tensors = dict(unwrapped(base).named_parameters()) if isinstance(base, nn.Module) else base
    source = Target(tensors, Layout(forms, ties), {})
    digests = source.digests()
    if not delta.known.is_of(digests, delta.whole):
        raise MismatchError(delta.known.difference(digests, delta.whole))
    decode_(delta, source.read)
    return source


def decode_(delta: Delta, read: Callable[[str, Tensor | None], Tensor]) -> None:
    """Decode the values of a delta from a thin file, where they are not yet.

    Args:
        delta: the delta.
        read: (name, coordinates or None for all) -> the values of its base, verified, there [count].
    """
    if delta.thin is not None:
        delta.fill_({name: read(name, delta.at(name)) for name in delta.thin.names})
