"""Several sparse writes as one: of each coordinate the last writer's value, written once."""

from collections.abc import Iterable

import torch
from torch import Tensor

from pipeline.masks.mask import Mask
from pipeline.parameters import ParameterIndex

Patch = dict[str, tuple[Tensor | None, Tensor]]  # name -> ascending int64 coordinates (None: all), values [count]


def merge(patches: Iterable[Patch]) -> Patch:
    """Join patches, the later one winning where several write a coordinate.

    Args:
        patches: oldest first; their tensors are not copied where only one patch writes them.

    Returns:
        The patch that does what they do one after the other.
    """
    writes: dict[str, list[tuple[Tensor | None, Tensor]]] = {}
    for patch in patches:
        for name, write in patch.items():
            if write[0] is None:
                writes[name] = [write]  # nothing written before it is left
            else:
                writes.setdefault(name, []).append(write)
    return {name: _last(several) for name, several in writes.items()}


def mask_of(patch: Patch, index: ParameterIndex) -> Mask:
    """Take the coordinates of a patch.

    Args:
        patch: of tensors in the index.
        index: the parameters.

    Returns:
        The mask.
    """
    partly = {name: at for name, (at, _) in patch.items() if at is not None}
    return Mask.covering(index, [name for name in patch if name not in partly], partly)


def _last(writes: list[tuple[Tensor | None, Tensor]]) -> tuple[Tensor | None, Tensor]:
    """Join writes of one tensor; only the first may be a whole one."""
    if len(writes) == 1:
        return writes[0]
    if writes[0][0] is None:
        values = writes[0][1].clone()
        for at, new in writes[1:]:
            values[at] = new
        return None, values
    coordinates, order = torch.sort(torch.cat([at for at, _ in writes if at is not None]), stable=True)
    newest = torch.ones(coordinates.numel(), dtype=torch.bool)
    newest[:-1] = coordinates[1:] != coordinates[:-1]  # equal ones stand in the order of their writing
    return coordinates[newest], torch.cat([values for _, values in writes])[order[newest]]
