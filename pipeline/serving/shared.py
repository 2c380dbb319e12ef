"""Several deltas over one base in one process: one copy of the base's weights, switched bit for bit."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.deltas.delta import Delta
from pipeline.deltas.target import Layout, Target
from pipeline.deltas.variants import Variants
from pipeline.errors import MismatchError, ModelError
from pipeline.parameters import unwrapped
from pipeline.tasks.saved import load_model


@dataclass
class _Form:
    """One form of the base: its trunk is shared with the other forms, its head is its own."""

    model: nn.Module
    layout: Layout
    digests: dict[str, str]
    deltas: dict[str, Delta]


class SharedBase:
    """A base that becomes any of several trained models, whatever the sizes of their heads.

    Deltas whose models have the same form switch as ``Variants`` do. A delta with another head gets a network of
    its own, every tensor of which that is equal in both *is* the first one's, so that n deltas cost one base, n
    deltas and the heads. A network that is left is turned back into the base before another one is used.

    Args:
        source: the base: package:, builtin:, a hub id or a folder.
        deltas: name -> delta of it, with the ``info`` that ``load_model`` needs.
        device: where the networks are.

    Attributes:
        active: the name in use; None for the base.

    Raises:
        MismatchError: if a delta is of another base; names both.
        ModelError: if the base cannot be loaded.
    """  # noqa: DOC502 - the second is raised by what it calls

    def __init__(self, source: str, deltas: Mapping[str, Delta], device: torch.device) -> None:
        forms: list[_Form] = []
        for name, delta in deltas.items():
            form = next((form for form in forms if _fits(form, delta)), None)
            if form is None:
                form = _form(source, name, delta, device)
                if forms:
                    _share(form, forms[0])
                forms.append(form)
            form.deltas[name] = delta
        self.active: str | None = None
        self._variants = [Variants(form.model, form.deltas) for form in forms]
        self._of = {name: variants for variants in self._variants for name in deltas if name in variants}

    def use(self, name: str) -> nn.Module:
        """Become a variant.

        Args:
            name: one of the deltas.

        Returns:
            The model: base + delta, bit for bit.
        """
        chosen = self._of[name]
        for variants in self._variants:
            if variants is not chosen and variants.active is not None:
                variants.use(None)
        model = chosen.use(name)
        self.active = name
        return model


def _fits(form: _Form, delta: Delta) -> bool:
    return delta.layout == form.layout and delta.known.is_of(form.digests, delta.whole)


def _form(source: str, name: str, delta: Delta, device: torch.device) -> _Form:
    try:
        model = load_model(source, info=delta.info).to(device)
    except ModelError as error:
        why = str(error).removeprefix("model.source: ")
        raise ModelError(f"base of delta '{name}': {why}; where it lies elsewhere, add --base MODEL") from None
    for key, parameter in unwrapped(model).named_parameters():
        dtype, _ = delta.layout.parameters.get(key, (parameter.dtype, ()))
        parameter.data = parameter.data.to(dtype)  # models are loaded in fp32; of a bf16 checkpoint that is exact
    layout = Layout.of(model)
    try:
        digests = Target(model, delta.layout, delta.buffers).digests()
    except MismatchError as error:
        raise MismatchError(f"base '{source}' and delta '{name}': {error}") from None
    if not delta.known.is_of(digests, delta.whole):
        raise MismatchError(f"base '{source}' and delta '{name}': {delta.known.difference(digests, delta.whole)}")
    return _Form(model, layout, digests, {})


def _share(form: _Form, first: _Form) -> None:
    """Let a network hold the first one's tensors wherever both are equal, tied weights under all their names."""
    theirs = dict(unwrapped(first.model).named_parameters(remove_duplicate=False))
    modules = dict(unwrapped(form.model).named_modules(remove_duplicate=False))
    for name in [*form.layout.parameters, *form.layout.ties]:
        known = form.layout.ties.get(name, name)
        if first.digests.get(known) == form.digests[known] and name in theirs:
            path, _, leaf = name.rpartition(".")
            setattr(modules[path], leaf, theirs[name])
