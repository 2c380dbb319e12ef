"""The parameters of a model as one flat space: names, shapes, offsets, and digests of their values."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from math import prod

import torch
from torch import Tensor, nn

from pipeline.errors import MismatchError

Shape = tuple[int, ...]


class ParameterIndex:
    """The flat coordinate space 0..n-1 of a model's trainable parameters.

    Parameters stand in the order of ``model.named_parameters()``; a tied weight counts once, under its first
    name. The flat coordinate of element i (row-major) of tensor t is ``offsets[t] + i``.

    Attributes:
        shapes: name -> shape, in flat order.
        offsets: name -> flat coordinate of the tensor's first element.
        total: n, the number of parameters.
    """

    def __init__(self, shapes: Mapping[str, Iterable[int]]) -> None:
        self.shapes: dict[str, Shape] = {name: tuple(int(d) for d in shape) for name, shape in shapes.items()}
        self.offsets: dict[str, int] = {}
        self.total = 0
        for name, shape in self.shapes.items():
            self.offsets[name] = self.total
            self.total += prod(shape)

    @classmethod
    def of(cls, model: nn.Module) -> "ParameterIndex":
        """Index the parameters of ``model`` that require a gradient, tied weights once.

        Returns:
            The index, in ``named_parameters`` order, without the prefixes of compiled or parallel wrappers.
        """
        return cls({name: p.shape for name, p in unwrapped(model).named_parameters() if p.requires_grad})

    def __len__(self) -> int:
        return len(self.shapes)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ParameterIndex) and list(self.shapes.items()) == list(other.shapes.items())

    def __hash__(self) -> int:
        return hash(tuple(self.shapes.items()))

    def numel(self, name: str) -> int:
        """Count the elements of tensor ``name``.

        Returns:
            The product of its shape.
        """
        return prod(self.shapes[name])

    @property
    def digest(self) -> str:
        """BLAKE2b-256 (hex) of the sorted names and shapes: equal for equal architectures."""
        text = "\n".join(f"{name} {list(shape)}" for name, shape in sorted(self.shapes.items()))
        return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()

    def within(self, modules: Iterable[str]) -> list[str]:
        """Names of the parameters inside the given modules, in flat order.

        ``classifier`` matches ``classifier.weight`` and the parameter ``classifier`` itself, never
        ``classifier_norm.weight``: names are compared module by module, not as substrings.

        Returns:
            The matching names.

        Raises:
            MismatchError: if a module name matches nothing.
        """
        chosen: set[str] = set()
        for module in modules:
            found = {name for name in self.shapes if name == module or name.startswith(module + ".")}
            if not found:
                near = sorted({name.split(".")[0] for name in self.shapes})
                raise MismatchError(
                    f"no parameter lies in module '{module}'; top-level modules of this model: {', '.join(near)}"
                )
            chosen |= found
        return [name for name in self.shapes if name in chosen]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """View a tensor's values as little-endian bytes in row-major order.

    Returns:
        A read-only view (of a CPU copy, where the tensor is elsewhere or not contiguous).
    """
    return byte_view(tensor.detach().to("cpu")).numpy().data.toreadonly()


def byte_view(tensor: Tensor) -> Tensor:
    """View a tensor's values as bytes in row-major order.

    Returns:
        uint8 [bytes] on the tensor's device; a copy where the tensor is not contiguous.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.numel() <= 1:  # contiguous whatever its stride, which may then not be 1 as the view needs it
        flat = flat.as_strided(flat.shape, (1,))
    return flat.view(torch.uint8)


def tensor_digest(tensor: Tensor) -> str:
    """Digest one tensor: BLAKE2b-256 (hex) over dtype, shape and bytes.

    Returns:
        64 hex digits.
    """
    head = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n"
    state = hashlib.blake2b(head.encode(), digest_size=32)
    state.update(tensor_bytes(tensor))
    return state.hexdigest()


def base_digest(model: nn.Module | Mapping[str, Tensor], *, without: Iterable[str] = ()) -> str:
    """Digest the values of all parameters of a model, whatever device they are on.

    The digest is BLAKE2b-256 over the sorted lines ``name tensor_digest``, so it does not depend on the order of
    the parameters, on buffers, or on which of them require a gradient. Tied weights count once.

    Args:
        model: a module, or its parameters by name.
        without: names to leave out (a delta leaves out the tensors it replaces whole, such as a fresh head).

    Returns:
        64 hex digits.
    """
    tensors = dict(unwrapped(model).named_parameters()) if isinstance(model, nn.Module) else model
    return digest_of_digests({name: tensor_digest(t) for name, t in tensors.items()}, without=without)


def digest_of_digests(digests: Mapping[str, str], *, without: Iterable[str] = ()) -> str:
    """Combine the digests of single tensors into the digest of a model (see ``base_digest``).

    Args:
        digests: name -> ``tensor_digest`` of that tensor.
        without: names to leave out.

    Returns:
        64 hex digits.
    """
    skip = set(without)
    lines = sorted(f"{name} {digest}" for name, digest in digests.items() if name not in skip)
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=32).hexdigest()


def unwrapped(model: nn.Module) -> nn.Module:
    """Look through ``torch.compile`` and the parallel wrappers, whose prefixes would change every name.

    Returns:
        The model inside, or the model itself.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def take(tensor: Tensor, coordinates: Tensor | None) -> Tensor:
    """Copy a tensor's elements at row-major coordinates, whatever its strides.

    Args:
        tensor: any shape.
        coordinates: int64 [count] on the tensor's device; None for all elements.

    Returns:
        A new tensor [count] in the tensor's dtype, on its device.
    """
    flat = tensor.detach().reshape(-1)
    if coordinates is None:
        return flat.clone()
    return flat.index_select(0, coordinates)


def put_(tensor: Tensor, coordinates: Tensor | None, values: Tensor) -> None:
    """Overwrite a tensor's elements at row-major coordinates and touch no other, whatever its strides.

    The tensor's version counter moves, so that a backward through the old values is refused and not wrong.

    Args:
        tensor: any shape; may be a leaf that requires a gradient.
        coordinates: int64 [count], unique, on the tensor's device; None for all elements.
        values: [count] in the tensor's dtype, on its device.
    """
    target = tensor.detach()
    with torch.no_grad():
        if coordinates is None:
            target.copy_(values.reshape(target.shape))
        elif target.is_contiguous():
            target.view(-1).index_copy_(0, coordinates, values)
        else:
            target.index_put_(torch.unravel_index(coordinates, target.shape), values)
