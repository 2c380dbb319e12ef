"""What a delta is applied to: the parameters and buffers of a module or of a state dict, found by name."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipeline.errors import MismatchError
from pipeline.parameters import Shape, byte_view, put_, take, tensor_digest, unwrapped

Model = nn.Module | Mapping[str, Tensor]
Write = tuple[Tensor, Tensor | None, Tensor]  # tensor, coordinates (None: all), new values [count]


@dataclass(frozen=True)
class Layout:
    """The form of a network, frozen tensors included: what a delta compares a model with before it writes.

    Attributes:
        parameters: name -> (dtype, shape) of every parameter, tied weights under their first name.
        ties: further names of tied weights -> the first name; state dicts may hold any of them.
    """

    parameters: dict[str, tuple[torch.dtype, Shape]]
    ties: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> "Layout":
        """Read the layout of a module.

        Returns:
            The layout.
        """
        first = {id(p): name for name, p in unwrapped(model).named_parameters()}
        names = unwrapped(model).named_parameters(remove_duplicate=False)
        ties = {name: first[id(p)] for name, p in names if first[id(p)] != name}
        return cls({n: (p.dtype, tuple(p.shape)) for n, p in unwrapped(model).named_parameters()}, ties)


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Collect the buffers that belong to a checkpoint: BatchNorm's statistics and counters, for example.

    Returns:
        name -> the buffer itself, not a copy.
    """
    saved = unwrapped(model).state_dict(keep_vars=True)
    return {name: b for name, b in unwrapped(model).named_buffers(remove_duplicate=False) if name in saved}


class Target:
    """A model seen through a layout, each tensor checked.

    Args:
        model: a module (plain, compiled or data-parallel) or a state dict, on any device.
        layout: what it must look like.
        buffers: buffers it must have, by name; only their dtypes and shapes are compared.

    Attributes:
        layout: as given.
        parameters: name -> the tensor.
        copies: name -> further tensors of a state dict that hold the same tied weight.
        buffers: name -> the buffer, for the names asked for.

    Raises:
        MismatchError: if a tensor is missing, of another shape or dtype, or unknown; names the first.
    """

    def __init__(self, model: Model, layout: Layout, buffers: Mapping[str, Tensor]) -> None:
        self.layout = layout
        if isinstance(model, nn.Module):
            trainable = dict(unwrapped(model).named_parameters(remove_duplicate=False))
            have_buffers: Mapping[str, Tensor] = dict(unwrapped(model).named_buffers(remove_duplicate=False))
            have: Mapping[str, Tensor] = {
                **have_buffers,
                **trainable,
            }  # a diff of two files cannot tell them apart
            known = {id(have[name]) for name in (*layout.parameters, *layout.ties) if name in have}
            for name, parameter in trainable.items():
                if id(parameter) not in known:
                    raise MismatchError(f"tensor '{name}' of this model is unknown to the delta: another model")
        else:
            have = have_buffers = model
        names: dict[str, list[str]] = {name: [name] for name in layout.parameters}
        for alias, name in layout.ties.items():
            names[name].append(alias)
        self.parameters: dict[str, Tensor] = {}
        self.copies: dict[str, list[Tensor]] = {}
        for name, (dtype, shape) in layout.parameters.items():
            found = {id(tensor): tensor for tensor in (have[alias] for alias in names[name] if alias in have)}
            if not found:
                raise MismatchError(f"tensor '{name}' {list(shape)} of the delta's base is not in this model")
            for tensor in found.values():
                _check(f"tensor '{name}'", tensor, dtype, shape)
            self.parameters[name], *self.copies[name] = found.values()
        self.buffers: dict[str, Tensor] = {}
        for name, buffer in buffers.items():
            if name not in have_buffers:
                raise MismatchError(f"buffer '{name}' {list(buffer.shape)} of the delta is not in this model")
            _check(f"buffer '{name}'", have_buffers[name], buffer.dtype, tuple(buffer.shape))
            self.buffers[name] = have_buffers[name]

    @property
    def anchor(self) -> Tensor:
        """The tensor object by which this module or dict is known again, as long as it lives."""
        return self.parameters[min(self.parameters)]

    def read(self, name: str, coordinates: Tensor | None) -> Tensor:
        """Copy the values of a parameter at CPU coordinates (None: all).

        Returns:
            [count], on the CPU.
        """
        tensor = self.parameters[name]
        return take(tensor, coordinates if coordinates is None else coordinates.to(tensor.device)).cpu()

    def copied_buffers(self) -> dict[str, Tensor]:
        """Copy the buffers asked for.

        Returns:
            name -> the copy, on the CPU.
        """
        return {name: buffer.detach().to("cpu", copy=True) for name, buffer in self.buffers.items()}

    def writes(self, name: str, coordinates: Tensor | None, values: Tensor) -> list[Write]:
        """Prepare overwriting a parameter, and every copy of it, at CPU coordinates.

        Returns:
            The writes, everything they need already on the tensors' devices.
        """
        return [
            (
                tensor,
                coordinates if coordinates is None else coordinates.to(tensor.device),
                values.to(tensor.device),
            )
            for tensor in (self.parameters[name], *self.copies[name])
        ]

    def buffer_writes(self, buffers: Mapping[str, Tensor]) -> list[Write]:
        """Prepare overwriting buffers whole.

        Returns:
            The writes.
        """
        return [(self.buffers[n], None, b.reshape(-1).to(self.buffers[n].device)) for n, b in buffers.items()]

    def digests(self, replaced: Mapping[str, tuple[Tensor | None, Tensor]] | None = None) -> dict[str, str]:
        """Digest every parameter, as it is or as it would be.

        Args:
            replaced: name -> CPU coordinates (None: all) and the values [count] to imagine there.

        Returns:
            name -> ``tensor_digest``.

        Raises:
            MismatchError: if a state dict holds two versions of a tied weight.
        """
        for name, copies in self.copies.items():
            if not all(same_bits(self.parameters[name], copy) for copy in copies):
                raise MismatchError(f"tied tensor '{name}' has different values under its several names")
        imagined = replaced or {}
        return {
            name: tensor_digest(self.changed(name, *imagined.get(name, (None, None)))) for name in self.parameters
        }

    def changed(self, name: str, coordinates: Tensor | None, values: Tensor | None) -> Tensor:
        """Take a parameter with other values at CPU coordinates (None: all); None as values changes nothing.

        Returns:
            The parameter itself where nothing changes, else a CPU tensor in its dtype and shape.
        """
        tensor = self.parameters[name].detach()
        if values is None:
            return tensor
        if coordinates is None:
            return values.reshape(tensor.shape)
        copy = tensor.to("cpu", copy=True)
        put_(copy, coordinates, values)
        return copy


def write_all(writes: Iterable[Write]) -> None:
    """Do all writes or none: after any failure, an interrupt included, the tensors hold their former bits."""
    write_over([(tensor, at, values, take(tensor, at)) for tensor, at, values in writes])


def write_over(planned: Sequence[tuple[Tensor, Tensor | None, Tensor, Tensor]]) -> None:
    """Do as ``write_all`` where the former values are at hand: each write with what it overwrites [count]."""
    done = 0
    try:
        for tensor, at, values, _ in planned:
            done += 1  # counted first: the write that fails may have begun
            put_(tensor, at, values)
    except BaseException:
        for tensor, at, _, before in reversed(planned[:done]):
            put_(tensor, at, before)
        raise


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Compare two tensors bit by bit, so that NaN equals itself and 0.0 differs from -0.0.

    Returns:
        True if dtype, shape and bits are equal.
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(byte_view(a.cpu()), byte_view(b.cpu()))


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as files do.

    Returns:
        For example ``float32``.
    """
    return str(dtype).removeprefix("torch.")


def _check(what: str, tensor: Tensor, dtype: torch.dtype, shape: Shape) -> None:
    """Refuse a tensor of another shape or dtype."""
    if tuple(tensor.shape) != shape:
        raise MismatchError(f"{what} is {list(tensor.shape)} in this model and {list(shape)} in the delta")
    if tensor.dtype != dtype:
        raise MismatchError(
            f"{what} is {dtype_name(tensor.dtype)} in this model and {dtype_name(dtype)} in the delta; "
            f"load the base in {dtype_name(dtype)}"
        )
