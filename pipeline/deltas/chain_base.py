"""The base's file of a chain: every parameter and persistent buffer under its own name, and their digests.

base.safetensors    as any safetensors reader takes it; only the buffers where the values are kept elsewhere
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import files
from pipeline.deltas.metadata import DTYPE_OF, of_type, shape_of, sound
from pipeline.deltas.target import Layout, dtype_name
from pipeline.parameters import Shape, digest_of_digests

FORMAT, VERSION = "fishmask-chain-base", 1
FILE = "base.safetensors"
Form = tuple[torch.dtype, Shape]
ADVICE = "bring back the file as it was written"


@dataclass(frozen=True)
class Root:
    """What a chain's base file says.

    Attributes:
        layout: names, dtypes and shapes of all parameters.
        buffers: name -> (dtype, shape) of every persistent buffer.
        digests: name -> ``tensor_digest`` of every parameter and buffer.
        keeps_values: whether the file holds the parameters.
        info: provenance (JSON-able).
        nbytes: the file's size.
    """

    layout: Layout
    buffers: dict[str, Form]
    digests: dict[str, str]
    keeps_values: bool
    info: dict[str, Any]
    nbytes: int

    @cached_property
    def state(self) -> str:
        """The digest of the base's parameters and buffers."""
        return digest_of_digests(self.digests)


def write(
    path: Path,
    layout: Layout,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    digests: Mapping[str, str],
    info: Mapping[str, Any],
) -> None:
    """Write a chain's base.

    Args:
        path: the file.
        layout: of the model.
        parameters: their values; empty where they are kept elsewhere.
        buffers: their values.
        digests: name -> ``tensor_digest`` of every parameter and buffer.
        info: provenance.
    """
    meta = {
        "parameters": [[n, dtype_name(dtype), list(shape)] for n, (dtype, shape) in layout.parameters.items()],
        "ties": layout.ties,
        "buffers": [[name, dtype_name(buffer.dtype), list(buffer.shape)] for name, buffer in buffers.items()],
        "digests": dict(digests),
        "keeps_values": bool(parameters),
        "info": info,
    }
    files.write_file(path, format=FORMAT, version=VERSION, meta=meta, sections={**parameters, **buffers})


def read(path: Path) -> Root:
    """Read what a base file says; its tensors stay unread.

    Returns:
        The root of the chain. An ArtifactError if the file is no sound base.
    """  # noqa: DOC501 - it becomes that
    meta, sizes = files.read_header(path, format=FORMAT, version=VERSION)
    with sound(path, "base of a chain", ADVICE):
        parameters, buffers = _forms(meta["parameters"]), _forms(meta["buffers"])
        digests = {n: of_type(str, d) for n, d in of_type(dict, meta["digests"]).items()}
        ties = {alias: of_type(str, n) for alias, n in of_type(dict, meta["ties"]).items()}
        keeps = of_type(bool, meta["keeps_values"])
        if set(digests) != {*parameters, *buffers} or not set(ties.values()) <= set(parameters):
            raise ValueError("its digests or ties name other tensors than it has")
        if set(sizes) != {*(parameters if keeps else ()), *buffers}:
            raise ValueError("its sections are not the tensors that it names")
        info = of_type(dict, meta["info"])
    return Root(Layout(parameters, ties), buffers, digests, keeps, info, path.stat().st_size)


def _forms(rows: Any) -> dict[str, Form]:
    """Read a table of tensors: name, dtype, shape."""
    forms = {of_type(str, name): (DTYPE_OF[dtype], shape_of(shape)) for name, dtype, shape in rows}
    if len(forms) != len(rows):
        raise ValueError("a tensor is named twice")
    return forms
