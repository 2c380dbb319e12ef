"""The base of a delta, seen through it and verified, heads aside."""

from torch import nn

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
    whole = [name for name in delta.mask.index if delta.mask.whole(name)]
    free = set(whole) - set(_coded(delta))
    forms = {name: form for name, form in delta.layout.parameters.items() if name not in free}
    ties = {alias: name for alias, name in delta.layout.ties.items() if name in forms}
    tensors = dict(unwrapped(base).named_parameters()) if isinstance(base, nn.Module) else base
    source = Target(tensors, Layout(forms, ties), {})
    digests = source.digests()
    if not delta.known.is_of(digests, whole):
        raise MismatchError(delta.known.difference(digests, whole))
    decode_(delta, source)
    return source


def decode_(delta: Delta, source: Target) -> None:
    """Decode the values of a delta from a thin file, where they are not yet.

    Args:
        delta: the delta.
        source: its base, verified.
    """
    if delta.thin is not None:
        delta.fill_({name: source.read(name, delta.at(name)) for name in _coded(delta)})


def _coded(delta: Delta) -> list[str]:
    """Names of the tensors whose values are coded against the base's."""
    return [] if delta.thin is None else [name for names, _, _ in delta.thin.rows.values() for name in names]
