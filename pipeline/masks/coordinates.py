"""Coordinates by tensor name: checked when given, joined as sets."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import MismatchError, ParamsError
from pipeline.parameters import ParameterIndex


class Coordinates(Mapping[str, Tensor]):
    """The coordinates of a mask by tensor name; those of a wholly chosen tensor are made on access.

    Args:
        index: the parameters.
        chosen: name -> sorted int64 [count] coordinates, or None for the whole tensor; every name.

    Attributes:
        index: the parameters.
    """

    def __init__(self, index: ParameterIndex, chosen: Mapping[str, Tensor | None]) -> None:
        self.index = index
        self._chosen = chosen

    def __getitem__(self, name: str) -> Tensor:
        coordinates = self._chosen[name]
        return torch.arange(self.index.numel(name)) if coordinates is None else coordinates

    def __iter__(self) -> Iterator[str]:
        return iter(self._chosen)

    def __len__(self) -> int:
        return len(self._chosen)


def checked(index: ParameterIndex, indices: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Check and copy coordinates.

    Args:
        index: the parameters.
        indices: name -> coordinates within that tensor, on any device; a name left out has none.

    Returns:
        name -> int64 [count] on the CPU, or None if they are the whole tensor; every name of the index.

    Raises:
        ParamsError: if some are not int64, one-dimensional and strictly increasing.
        MismatchError: if a name is not in the index, or a coordinate lies outside its tensor.
    """  # noqa: DOC502 - raised by what it calls
    refuse_unknown(index, indices)
    empty = torch.empty(0, dtype=torch.int64)
    return {n: _checked(n, indices[n], index.numel(n)) if n in indices else empty for n in index}


def refuse_unknown(index: ParameterIndex, names: Iterable[str]) -> None:
    """Check that tensors exist.

    Raises:
        MismatchError: if a name is not in the index.
    """
    unknown = [name for name in names if name not in index]
    if unknown:
        raise MismatchError(f"mask names tensor '{unknown[0]}', which the parameters do not have")


def _checked(name: str, coordinates: Tensor, numel: int) -> Tensor | None:
    if coordinates.dtype != torch.int64 or coordinates.ndim != 1:
        form = f"{coordinates.dtype} of {coordinates.ndim} dimensions"
        raise ParamsError(f"coordinates of tensor '{name}' are {form}; expected one-dimensional int64")
    own = coordinates.detach().to("cpu", copy=True).contiguous()
    if own.numel() == 0:
        return own
    if own.numel() > 1 and not bool((own[1:] > own[:-1]).all()):
        raise ParamsError(f"coordinates of tensor '{name}' are not strictly increasing")
    if int(own[0]) < 0 or int(own[-1]) >= numel:
        raise MismatchError(
            f"coordinates of tensor '{name}' reach from {int(own[0])} to {int(own[-1])}; it has {numel} elements"
        )
    return None if own.numel() == numel else own


def joined(
    one: Coordinates, two: Coordinates, join: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> dict[str, Tensor]:
    """Join coordinates of the same parameters tensor by tensor.

    Args:
        one: the left ones.
        two: the right ones.
        join: of two sorted int64 sets, such as ``np.union1d``.

    Returns:
        name -> sorted int64 [count].

    Raises:
        MismatchError: if they are of different parameters.
    """
    if one.index.shapes != two.index.shapes:
        raise MismatchError(f"masks of different parameters do not combine: {_difference(one.index, two.index)}")
    return {name: torch.from_numpy(join(one[name].numpy(), two[name].numpy())) for name in one}


def _difference(one: ParameterIndex, two: ParameterIndex) -> str:
    """Name the first tensor in which two indices differ."""
    for name in sorted(set(one) | set(two)):
        if one.shapes.get(name) != two.shapes.get(name):
            forms = [str(list(i.shapes[name])) if name in i else "absent" for i in (one, two)]
            return f"tensor '{name}' is {forms[0]} in one and {forms[1]} in the other"
    return "they are equal"
