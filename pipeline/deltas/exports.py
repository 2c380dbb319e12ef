"""Deltas for other tools: git-theta's sparse updates, and vLLM's sparse checkpoint patches.

Both are plain safetensors files that other programs read; as fishmask writes them, every section is checksummed.
Tensors carry the names of the base's checkpoint. ``read_patch`` and ``apply_update`` are the other direction.

git-theta (its ``updates/sparse.py``; ``git theta add MODEL --update-type sparse --update-path FILE``)::

    <name>/data      [count]      after - before, in the tensor's dtype, where it is not zero
    <name>/indices   [count]      row-major coordinates, ascending: int32, int64 from 2^31 elements on
    <name>/indptr    [2]          0 and count: one row of a CSR matrix, in the dtype of the indices
    <name>/shape     int64 [dims] of the tensor

git-theta adds, so the sum is within rounding of the trained value: half a unit in the last place of the
difference, and half of the sum. numpy has no bfloat16: refused. A tensor that the checkpoint lacks (a fresh head)
has nothing to be added to, and stands whole under its plain name.

vLLM has no file format; its ``model_executor/model_loader/checkpoint_weight_patch.py`` takes patches of name,
shape, dtype, values and indices, from any source::

    <name>.indices   [count]      row-major coordinates, ascending: int32, int64 from 2^31 elements on
    <name>.values    [count]      the trained values themselves, in the tensor's dtype: exact

and ``shapes`` (name -> shape) in the metadata. All patches are sparse, a head's too, since one call cannot mix
sparse and dense ones. vLLM keeps NaN for "unchanged" and takes floats only: a delta with others is refused.
"""

from collections.abc import Callable, Iterator, Mapping
from math import prod
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline import files
from pipeline.deltas.delta import Delta
from pipeline.deltas.origin import origin
from pipeline.deltas.target import dtype_name, same_bits
from pipeline.errors import MismatchError
from pipeline.parameters import Shape, put_, take

GIT_THETA, DATA, INDICES, INDPTR, SHAPE = "fishmask-git-theta", "/data", "/indices", "/indptr", "/shape"
PATCH, AT, VALUES, SHAPES = "fishmask-weight-patch", ".indices", ".values", "shapes"
VERSION = 1


class Change(NamedTuple):
    """What a delta changes of one tensor of a checkpoint.

    Attributes:
        name: the tensor's name in the checkpoint; the module's, where the checkpoint lacks it.
        shape: its shape.
        at: ascending int64 coordinates [count].
        after: the trained values [count].
        before: the base's [count]; None where the checkpoint lacks the tensor.
    """

    name: str
    shape: Shape
    at: Tensor
    after: Tensor
    before: Tensor | None


class Patch(NamedTuple):
    """A sparse patch; ``CheckpointWeightPatch(*patch)`` is vLLM's.

    Attributes:
        name: of the tensor in the checkpoint.
        shape: of the whole tensor.
        dtype: of the tensor and the values.
        values: the new values [count].
        indices: their row-major coordinates: int32 or int64 [count], ascending.
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    values: Tensor
    indices: Tensor


def changes(delta: Delta, base: Mapping[str, Tensor], named: Callable[[str], str]) -> Iterator[Change]:
    """List what a delta changes, parameters first, then the buffers that differ from the base's.

    Args:
        delta: the delta.
        base: the base's tensors by the module's names; heads may be missing.
        named: the module's name of a tensor -> the checkpoint's.

    Yields:
        A change for every tensor that has one; a tied weight under each name that the base has it by.

    Raises:
        MismatchError: if ``base`` is not the delta's.
    """  # noqa: DOC502 - raised by what it calls
    origin(delta, base)
    ties: dict[str, list[str]] = {}
    for alias, first in delta.layout.ties.items():
        ties.setdefault(first, []).append(alias)
    tensors = {n: (s, delta.mask.indices[n], delta.values[n]) for n, s in delta.mask.index.shapes.items()}
    for name, buffer in delta.buffers.items():
        if name not in base or not same_bits(base[name], buffer):
            tensors[name] = (tuple(buffer.shape), torch.arange(buffer.numel()), buffer.reshape(-1))
    for first, (shape, at, after) in tensors.items():
        names = [first, *ties.get(first, [])]
        for name in [n for n in names if n in base] or [first]:
            if at.numel():
                before = take(base[name], at) if name in base and tuple(base[name].shape) == shape else None
                yield Change(named(name), shape, at, after, before)


def write_update(
    path: str | PathLike[str], delta: Delta, base: Mapping[str, Tensor], named: Callable[[str], str] = str
) -> int:
    """Write a delta as git-theta's sparse updates.

    Args:
        path: the file.
        delta: the delta.
        base: as ``changes``.
        named: as ``changes``.

    Returns:
        The bytes written.

    Raises:
        MismatchError: if ``base`` is not the delta's, or a tensor is bfloat16, which numpy does not have.
    """
    sections: dict[str, Tensor] = {}
    for name, shape, at, after, before in changes(delta, base, named):
        if after.dtype == torch.bfloat16:
            raise MismatchError(
                f"tensor '{name}' is bfloat16, which git-theta's numpy does not have; use --to vllm"
            )
        if before is None:
            sections[name] = after.reshape(shape)
            continue
        difference = after - before
        moved = difference != 0
        indices = _narrow(at[moved], shape)
        sections |= {
            name + DATA: difference[moved],
            name + INDICES: indices,
            name + INDPTR: torch.tensor([0, indices.numel()], dtype=indices.dtype),
            name + SHAPE: torch.tensor(shape, dtype=torch.int64),
        }
    return files.write_file(path, format=GIT_THETA, version=VERSION, meta=_about(delta), sections=sections)


def apply_update(path: str | PathLike[str], tensors: dict[str, np.ndarray]) -> None:
    """Add the updates of a file to the tensors of a checkpoint, as git-theta does, and put in what they lack.

    Args:
        path: as ``write_update`` wrote it.
        tensors: by name; entries are replaced, not written on.
    """
    _, sections = files.read_file(path, format=GIT_THETA, version=VERSION)
    for key, section in sections.items():
        name, slash, part = key.rpartition("/")
        if not slash:
            tensors[key] = section.numpy()
        elif "/" + part == DATA:
            update = np.zeros(tensors[name].size, dtype=tensors[name].dtype)
            update[sections[name + INDICES].numpy()] = section.numpy()
            tensors[name] = tensors[name] + update.reshape(sections[name + SHAPE].tolist())


def write_patch(
    path: str | PathLike[str], delta: Delta, base: Mapping[str, Tensor], named: Callable[[str], str] = str
) -> int:
    """Write a delta as sparse patches of a checkpoint, as vLLM takes them.

    Args:
        path: the file.
        delta: the delta.
        base: as ``changes``.
        named: as ``changes``.

    Returns:
        The bytes written.

    Raises:
        MismatchError: if ``base`` is not the delta's, or a value is NaN or no float.
    """
    sections: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, shape, at, after, _ in changes(delta, base, named):
        if not after.is_floating_point() or bool(after.isnan().any()):
            what = "NaN, which vLLM keeps for unchanged values" if after.is_floating_point() else "no float"
            raise MismatchError(f"tensor '{name}' ({dtype_name(after.dtype)}) holds {what}; use --to dense")
        sections |= {name + AT: _narrow(at, shape), name + VALUES: after}
        shapes[name] = list(shape)
    meta = _about(delta) | {SHAPES: shapes}
    return files.write_file(path, format=PATCH, version=VERSION, meta=meta, sections=sections)


def read_patch(path: str | PathLike[str]) -> list[Patch]:
    """Read sparse patches.

    Returns:
        One for each tensor.
    """
    meta, sections = files.read_file(path, format=PATCH, version=VERSION)
    return [
        Patch(name, tuple(shape), sections[name + VALUES].dtype, sections[name + VALUES], sections[name + AT])
        for name, shape in meta[SHAPES].items()
    ]


def apply_patch(path: str | PathLike[str], tensors: dict[str, Tensor]) -> None:
    """Write the patches of a file into the tensors of a checkpoint, and put in what it lacks."""
    for name, shape, dtype, values, indices in read_patch(path):
        put_(tensors.setdefault(name, torch.empty(shape, dtype=dtype)), indices.long(), values)


def _narrow(coordinates: Tensor, shape: Shape) -> Tensor:
    return coordinates.to(torch.int32 if prod(shape) < 2**31 else torch.int64)


def _about(delta: Delta) -> dict[str, Any]:
    return {"delta": delta.digest, "base": delta.base, "info": delta.info}
