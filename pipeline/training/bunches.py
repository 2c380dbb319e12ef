"""Small tensors of a network taken together, where each kernel has its price whatever its size.

A network has a hundred tensors and more, most of them small; gathering from and writing to each by itself is two
kernels a tensor and step, and on a GPU the host is busier launching them than the device is running them. Together
they are a handful: one copy puts the tensors side by side, one index picks from or writes to all, and one copy
puts them back. Only values move; the result is the same to the last bit.

Shape legend: m elements of the tensors together; k trained values; j of them in these tensors.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

DEVICES = {"cuda"}
"""Kinds of device where this pays. On a CPU a call costs little and a copy does not."""
SMALL = 1 << 20
"""Elements of a tensor up to which it is taken together with others."""
TOGETHER = 1 << 23
"""Elements taken together at most: 32 MiB in fp32, the memory that this costs."""

Stretch = tuple[int, int, Tensor | None, int]
"""Of a tensor: where its values begin and end in θ, its coordinates (None: all), its number of elements."""


def pays(tensor: Tensor) -> bool:
    """Tell whether a tensor is one to be taken together with others."""
    return tensor.device.type in DEVICES and tensor.numel() <= SMALL


class Bunch:
    """Where the trained values of some tensors lie, in the tensors side by side and in θ.

    Args:
        stretches: of the tensors, none trained whole, in the order in which they are given from now on.
        device: theirs.
    """

    def __init__(self, stretches: Sequence[Stretch], device: torch.device) -> None:
        at, places, before = [], [], 0
        for start, stop, coordinates, size in stretches:
            assert coordinates is not None
            at.append(coordinates + before)
            places.append(torch.arange(start, stop, device=device))
            before += size
        self._at, self._places = torch.cat(at), torch.cat(places)
        self._sizes = [size for *_, size in stretches]

    def gather(self, tensors: Sequence[Tensor], into: Tensor, *, add: bool) -> None:
        """Take the tensors' values at their coordinates into θ, or something of its form.

        Args:
            tensors: [m] elements together; of several dtypes, each value is kept in the widest.
            into: [k]; only the places of these tensors are touched.
            add: add them, or write them.
        """
        together: Tensor = torch._utils._flatten_dense_tensors(list(tensors))
        picked = together.index_select(0, self._at).to(into.dtype)
        (into.index_add_ if add else into.index_copy_)(0, self._places, picked)

    def write(self, tensors: Sequence[Tensor], theta: Tensor) -> None:
        """Write θ's values to the tensors at their coordinates; the others are written with what they are.

        Args:
            tensors: flat views of the weights, [m] together.
            theta: [k], of their dtype.
        """
        together = torch.cat(list(tensors))
        together.index_copy_(0, self._at, theta.index_select(0, self._places))
        torch._foreach_copy_(list(tensors), list(together.split(self._sizes)))


def bunched(tensors: Mapping[str, tuple[Tensor, Stretch]]) -> Iterator[tuple[list[str], list[Tensor], Bunch]]:
    """Part tensors into bunches of one dtype and at most ``TOGETHER`` elements, in their order.

    Args:
        tensors: name -> flat view, and which of its elements go where.

    Yields:
        Names, views and places of two tensors or more.
    """
    by_dtype: dict[torch.dtype, list[list[str]]] = {}
    room: dict[torch.dtype, int] = {}
    for name, (flat, _) in tensors.items():
        bunches = by_dtype.setdefault(flat.dtype, [])
        if flat.numel() > room.get(flat.dtype, 0):
            bunches.append([])
            room[flat.dtype] = TOGETHER
        bunches[-1].append(name)
        room[flat.dtype] -= flat.numel()
    for names in (names for bunches in by_dtype.values() for names in bunches if len(names) > 1):
        flats = [tensors[name][0] for name in names]
        yield names, flats, Bunch([tensors[name][1] for name in names], flats[0].device)
