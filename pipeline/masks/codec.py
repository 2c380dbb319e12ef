"""The coordinates of a mask as bytes: for each tensor the smallest of five coders.

``none`` and ``all`` cost nothing; ``rice`` (rice.py) suits a uniform choice, ``stairs`` (stairs.py) one that
clusters in rows and columns, as a Fisher mask does, ``varint`` (varint.py) a repeated pattern. Tensors of one
coder, of one parameter for Rice's, share a stream, laid end to end as one long tensor: a mask has few streams
however many tensors, which keeps it small and quick to read.

Two uint8 sections result: ``tensors`` (table.py) and ``coordinates``, the streams end to end. A coder's name is
its version: one that changes gets a new name.
"""

from collections.abc import Mapping
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import ArtifactError
from pipeline.masks import rice, stairs, varint
from pipeline.masks.choice import RICE, smallest
from pipeline.masks.table import Stream, read_table, write_table
from pipeline.parameters import ParameterIndex

TABLE, BODY = "tensors", "coordinates"
Array = np.ndarray
_CODERS = {"none", "all", "stairs", "varint", *RICE}


def encode(
    index: ParameterIndex, chosen: Mapping[str, Tensor | None], *, compact: bool = True
) -> dict[str, Tensor]:
    """Code coordinates.

    Args:
        index: the parameters.
        chosen: name -> sorted int64 coordinates on the CPU, or None for the whole tensor; every name.
        compact: try the other coders beside Rice's; without them coding is several times faster.

    Returns:
        The uint8 sections ``tensors`` and ``coordinates``.
    """
    coders: dict[str, str] = {}
    partly: dict[str, Array] = {}
    for name, part in chosen.items():
        size = index.numel(name) if part is None else part.numel()
        coders[name] = "none" if size == 0 else "all" if size == index.numel(name) else ""
        if not coders[name] and part is not None:
            partly[name] = part.numpy()
    coded = smallest(index, partly, compact=compact)
    return {
        TABLE: _section(write_table(index, coders | coded.coders, coded.streams)),
        BODY: _section(b"".join(coded.codes)),
    }


def _section(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def decode(sections: Mapping[str, Tensor], where: str) -> tuple[ParameterIndex, dict[str, Tensor | None]]:
    """Decode coordinates; what is not exactly a mask is refused, and memory is bounded by the sections' size.

    Args:
        sections: what ``encode`` returned.
        where: the file, for messages.

    Returns:
        The parameters, and name -> sorted int64 coordinates, or None for a whole tensor.

    Raises:
        ArtifactError: if the sections hold anything else.
    """
    for name in (TABLE, BODY):
        if name not in sections or sections[name].dtype != torch.uint8 or sections[name].ndim != 1:
            raise ArtifactError(f"{where}: section '{name}' is missing or no row of bytes; make the file again")
    try:
        index, coders, streams = read_table(sections[TABLE].numpy().tobytes())
    except ValueError as error:
        raise ArtifactError(f"{where}: section '{TABLE}' is corrupt: {error}; make the file again") from None
    unknown = sorted({*coders.values(), *(stream.coder for stream in streams)} - _CODERS)
    if unknown:
        raise ArtifactError(
            f"{where}: section '{BODY}' is coded as '{unknown[0][:40]}'; upgrade fishmask to read it"
        )
    try:
        return index, _decode(index, coders, streams, sections[BODY].numpy())
    except ValueError as error:
        raise ArtifactError(f"{where}: section '{BODY}' is corrupt: {error}; make the file again") from None


def _decode(
    index: ParameterIndex, coders: Mapping[str, str], streams: list[Stream], body: Array
) -> dict[str, Tensor | None]:
    used = {coder for coder in coders.values() if coder not in ("none", "all")}
    told = sum(stream.size for stream in streams)
    if sorted(used) != sorted(stream.coder for stream in streams) or told != len(body):
        raise ValueError(f"its streams do not fit {len(body)} bytes")
    empty = torch.empty(0, dtype=torch.int64)
    chosen: dict[str, Tensor | None] = {name: None if coders[name] == "all" else empty for name in index}
    end = 0
    for coder, count, size in streams:
        names = [name for name in index if coders[name] == coder]
        start, end = end, end + size
        code = body[start:end]
        if coder == "stairs":
            shapes = [stairs.matrix_shape(index.shapes[name], index.numel(name)) for name in names]
            parts = stairs.decode(code, shapes)
            if sum(map(len, parts)) != count:
                raise ValueError(f"its staircases hold {sum(map(len, parts))} coordinates instead of {count}")
        else:
            bounds = list(accumulate((index.numel(name) for name in names), initial=0))
            if coder == "varint":
                flat = varint.decode(code, count, bounds[-1])
            else:
                flat = rice.decode(code, count, RICE[coder], bounds[-1])
            cuts = [0, *np.searchsorted(flat, bounds[1:]).tolist()]
            parts = [flat[a:b] - first for a, b, first in zip(cuts, cuts[1:], bounds, strict=False)]
        chosen |= {name: torch.from_numpy(part) for name, part in zip(names, parts, strict=True)}
    return chosen
