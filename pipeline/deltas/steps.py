"""The files of a chain of checkpoints (chain.py): its base, one file a step, and the masks they share.

    base.safetensors              the base (chain_base.py)
    mask-<16 digits>.safetensors  a mask file, named by its digest
    step-<6 digits>.safetensors   values.<dtype>   at the mask, tensors in the order of its index
                                  buffers.<dtype>  those that changed, sorted by name

A step's metadata names the step it follows, the digests of the states before and after it, its mask, and how each
section is coded (values.py). Where the base's file has the base's values, a step's are coded against those, never
against another step's: any is read by itself. The files alone are the chain: no list of them could disagree.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import files
from pipeline.deltas import chain_base, thin
from pipeline.deltas import values as coding
from pipeline.deltas.chain_base import ADVICE, Root
from pipeline.deltas.metadata import of_type, sound
from pipeline.deltas.overlay import Patch
from pipeline.deltas.target import Target, dtype_name
from pipeline.masks.mask import Mask

STEP, VERSION = "fishmask-chain-step", 1
PARTS = ("coordinates", "values", "buffers", "header")  # what the bytes of a step are made of
STEP_FILE = re.compile(r"step-(\d{6,18})\.safetensors")
MASK_FILE = re.compile(r"mask-[0-9a-f]{16}\.safetensors")
LEFTOVER = re.compile(r"\.(base|step-\d+|mask-[0-9a-f]+)\.safetensors\.[0-9a-f]{12}\.tmp")  # of a killed writer


@dataclass(frozen=True)
class Step:
    """What a step's file says of itself.

    Attributes:
        number: of the step, from 1.
        after: the number of the step it follows; 0 for the base.
        parent: the digest of all parameters and buffers before it.
        state: the same after it.
        mask: the digest of the mask whose values it holds.
        count: how many values it holds.
        buffers: sorted names of the buffers it holds, which are those that changed.
        info: free (JSON-able): epoch, metrics.
        joined: digests of the states that were steps of their own, between parent and state, before a squash or a
            prune.
        nbytes: its bytes on disk: ``coordinates`` (of its mask's file; 0 where an earlier step has the same mask),
            ``values``, ``buffers`` and ``header``.
    """

    number: int
    after: int
    parent: str
    state: str
    mask: str
    count: int
    buffers: list[str]
    info: dict[str, Any]
    joined: list[str]
    nbytes: dict[str, int]


def step_file(number: int) -> str:
    """Name the file of a step.

    Returns:
        For example ``step-000001.safetensors``.
    """
    return f"step-{number:06d}.safetensors"


def mask_file(digest: str) -> str:
    """Name the file of a mask.

    Returns:
        ``mask-`` and the first 16 hex digits of its digest.
    """
    return f"mask-{digest[:16]}.safetensors"


def write_step(
    path: Path,
    step: Step,
    mask: Mask,
    values: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    base: Target | None,
) -> None:
    """Write a step's file: the one write by which the step comes to be.

    Args:
        path: the file.
        step: what it is to say; its bytes are not looked at.
        mask: the step's mask; its own file must be there.
        values: name -> [count] for the tensors that have coordinates.
        buffers: those that changed.
        base: what the values are coded against; None codes them on their own.
    """
    coded = {}
    for dtype, names in _by_dtype({name: values[name].dtype for name in mask.index if name in values}).items():
        row = thin.joined(values, names)
        ways = [coding.encode(row)]
        if base is not None:
            ways.append(coding.encode_against(row, _before(base, mask, names), thin.places(mask, names)))
        coded[f"values.{dtype_name(dtype)}"] = min(ways, key=lambda way: way[1].numel() * way[1].element_size())
    for dtype, names in _by_dtype({name: buffers[name].dtype for name in step.buffers}).items():
        row = thin.joined({name: buffers[name].detach().to("cpu") for name in names}, names)
        coded[f"buffers.{dtype_name(dtype)}"] = coding.encode(row)
    meta = {key: value for key, value in vars(step).items() if key != "nbytes"}
    meta["coders"] = {name: coder for name, (coder, _) in coded.items()}
    sections = {name: section for name, (_, section) in coded.items()}
    files.write_file(path, format=STEP, version=VERSION, meta=meta, sections=sections)


def number_of(name: str) -> int | None:
    """Tell a step's number from the name of its file.

    Returns:
        The number; None where the name is not a step's.
    """
    found = STEP_FILE.fullmatch(name)
    return int(found[1]) if found and step_file(int(found[1])) == name and int(found[1]) else None


def is_part(name: str) -> bool:
    """Tell whether a file of this name is a chain's base or one of its steps.

    Returns:
        True if so.
    """
    return name == chain_base.FILE or number_of(name) is not None


def read_step(path: Path) -> Step:
    """Read what a step's file says; its values stay unread.

    Returns:
        The step, without the bytes of its coordinates. An ArtifactError if the file is no sound step.
    """  # noqa: DOC501 - it becomes that
    meta, sizes = files.read_header(path, format=STEP, version=VERSION)
    with sound(path, "step of a chain", ADVICE):
        number, after, count = (of_type(int, meta[key]) for key in ("number", "after", "count"))
        parent, state, mask = (of_type(str, meta[key]) for key in ("parent", "state", "mask"))
        buffers, joined = ([of_type(str, n) for n in of_type(list, meta[key])] for key in ("buffers", "joined"))
        if number != number_of(path.name) or not 0 <= after < number:
            raise ValueError(f"it is step {number} after step {after} by content")
        nbytes = {
            kind: sum(size for n, size in sizes.items() if n.startswith(f"{kind}."))
            for kind in ("values", "buffers")
        }
        header = path.stat().st_size - sum(nbytes.values())
        info = of_type(dict, meta["info"])
    return Step(number, after, parent, state, mask, count, buffers, info, joined, nbytes | {"header": header})


def read_content(
    path: Path, step: Step, mask: Mask, root: Root, base: Target | None
) -> tuple[Patch, dict[str, Tensor]]:
    """Read a step's values and buffers, every byte verified.

    Args:
        path: the step's file.
        step: what was read of it before.
        mask: the step's mask.
        root: the chain's base.
        base: its values, as in ``write_step``.

    Returns:
        The patch, and the buffers by name. An ArtifactError if the file is no sound step, or another one than it
        was.
    """  # noqa: DOC501 - it becomes that
    meta, own = files.read_file(path, format=STEP, version=VERSION)
    with sound(path, "step of a chain", ADVICE):
        if (meta["state"], meta["mask"], meta["buffers"]) != (step.state, step.mask, step.buffers):
            raise ValueError("it was replaced by another step since the chain was opened")
        for name, shape in mask.index.shapes.items():
            if root.layout.parameters[name][1] != shape:
                raise ValueError(f"tensor '{name}' is {list(shape)} in its mask")
        coders = of_type(dict, meta["coders"])
        if set(coders) != set(own):
            raise ValueError("its sections are not those that it names")
        patch: Patch = {}
        for dtype, names in _by_dtype({
            n: root.layout.parameters[n][0] for n in mask.index if mask.count(n)
        }).items():
            section = f"values.{dtype_name(dtype)}"
            places, counts = thin.places(mask, names), [mask.count(name) for name in names]
            if coders[section] == coding.RESIDUALS and base is not None:
                before = _before(base, mask, names)
                row = coding.decode_against(own.pop(section), coding.RESIDUALS, before, places)
            else:
                row = coding.decode(own.pop(section), coders[section], dtype, sum(counts))
            parts = row.split(counts)
            patch |= {n: (place.coordinates, part) for n, place, part in zip(names, places, parts, strict=True)}
        buffers: dict[str, Tensor] = {}
        for dtype, names in _by_dtype({name: root.buffers[name][0] for name in step.buffers}).items():
            section, shapes = f"buffers.{dtype_name(dtype)}", [root.buffers[name][1] for name in names]
            row = coding.decode(own.pop(section), coders[section], dtype, sum(map(prod, shapes)))
            parts = row.split([prod(shape) for shape in shapes])
            buffers |= {n: part.reshape(shape) for n, part, shape in zip(names, parts, shapes, strict=True)}
        if own:
            raise ValueError(f"section '{next(iter(own))}' is unknown")
    return patch, buffers


def _before(base: Target, mask: Mask, names: Iterable[str]) -> Tensor:
    """The base's values at the mask, of tensors of one dtype."""
    return torch.cat([base.read(name, mask.at(name)) for name in names])


def _by_dtype(dtypes: Mapping[str, torch.dtype]) -> dict[torch.dtype, list[str]]:
    """Sort tensors by dtype, in order: each has one section."""
    names: dict[torch.dtype, list[str]] = {}
    for name, dtype in dtypes.items():
        names.setdefault(dtype, []).append(name)
    return names
