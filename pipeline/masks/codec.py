"""The coordinates of a mask as bytes: for each tensor the smallest of four coders.

``none`` and ``all`` cost nothing; ``rice`` (rice.py) suits a uniform choice; ``stairs`` (stairs.py) one that
clusters in rows and columns, as a Fisher mask does. Tensors of one Rice parameter share a stream, laid end to end
as one long tensor: a mask has few streams however many tensors, which keeps it small and quick to read.

Two uint8 sections result. ``tensors``: LZMA of a JSON table {names, shapes, coders (one per tensor), streams
(one [coder, coordinates, bytes] per stream)}. ``coordinates``: the streams end to end. A coder's name is its
version: one that changes gets a new name.
"""

from collections.abc import Mapping
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.canonical import canonical_json, strict_json
from pipeline.errors import ArtifactError
from pipeline.masks import rice, stairs
from pipeline.parameters import ParameterIndex

TABLE, BODY = "tensors", "coordinates"
Array = np.ndarray
_CODERS = {"none", "all", "stairs", *(f"rice{r}" for r in range(48))}
_WORTH = 64  # bits a tensor must save to get a Rice stream of another parameter than most


class _Stream(NamedTuple):
    coder: str
    held: int  # coordinates
    code: bytes


def encode(
    index: ParameterIndex, chosen: Mapping[str, Tensor | None], *, compact: bool = True
) -> dict[str, Tensor]:
    """Code coordinates.

    Args:
        index: the parameters.
        chosen: name -> sorted int64 coordinates on the CPU, or None for the whole tensor; every name.
        compact: try the staircase coder too; without it coding is several times faster.

    Returns:
        The uint8 sections ``tensors`` and ``coordinates``.
    """
    coders: dict[str, str] = {}
    arrays: dict[str, Array] = {}
    for name, part in chosen.items():
        size = index.numel(name) if part is None else part.numel()
        coders[name] = "none" if size == 0 else "all" if size == index.numel(name) else ""
        if not coders[name] and part is not None:
            arrays[name] = part.numpy()
    ways = [_code(index, arrays, stepped) for stepped in ((False, True) if compact else (False,))]
    coding, streams = min(ways, key=lambda way: sum(len(stream.code) for stream in way[1]))
    table = {
        "names": list(index),
        "shapes": [list(shape) for shape in index.shapes.values()],
        "coders": [coders[name] or coding[name] for name in index],
        "streams": [[s.coder, s.held, len(s.code)] for s in streams],
    }
    return {
        TABLE: _section(stairs.squeeze(canonical_json(table).encode())),
        BODY: _section(b"".join(stream.code for stream in streams)),
    }


def _section(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _code(
    index: ParameterIndex, arrays: Mapping[str, Array], stepped: bool
) -> tuple[dict[str, str], list[_Stream]]:
    """Code the partly chosen tensors, each as a staircase where that is allowed and looks smaller."""
    gaps = {name: rice.gaps_of(array) for name, array in arrays.items()}
    best = {name: rice.best_parameter(gap) for name, gap in gaps.items()}
    parts: dict[str, stairs.Stairs] = {}
    if stepped:
        for name, array in arrays.items():
            part = stairs.take_apart(array, stairs.matrix_shape(index.shapes[name], index.numel(name))[1])
            if part is not None and stairs.estimate(part) < best[name][1] // 8 + 1:
                parts[name] = part
    code = stairs.encode(list(parts.values())) if parts else None
    if code is None:
        parts = {}
    coding = dict.fromkeys(parts, "stairs")
    rest = [name for name in arrays if name not in parts]
    if rest:
        most, _ = rice.best_parameter(np.concatenate([gaps[name] for name in rest]))
        for name in rest:
            saved = rice.code_bits(gaps[name], most) - best[name][1]
            coding[name] = f"rice{best[name][0] if saved > _WORTH else most}"
    streams = [] if code is None else [_Stream("stairs", sum(len(arrays[name]) for name in parts), code)]
    for coder in sorted({coding[name] for name in rest}):
        names = [name for name in rest if coding[name] == coder]
        starts = accumulate((index.numel(name) for name in names), initial=0)
        flat = np.concatenate([arrays[name] + start for name, start in zip(names, starts, strict=False)])
        streams.append(_Stream(coder, len(flat), rice.encode(rice.gaps_of(flat), int(coder[4:]))))
    return coding, streams


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
        index, coders, streams = _read_table(stairs.expand(sections[TABLE].numpy().tobytes()))
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{where}: section '{TABLE}' is corrupt: {error}; make the file again") from None
    unknown = sorted({*coders.values(), *(coder for coder, _, _ in streams)} - _CODERS)
    if unknown:
        raise ArtifactError(
            f"{where}: section '{BODY}' is coded as '{unknown[0][:40]}'; upgrade fishmask to read it"
        )
    try:
        return index, _decode(index, coders, streams, sections[BODY].numpy())
    except ValueError as error:
        raise ArtifactError(f"{where}: section '{BODY}' is corrupt: {error}; make the file again") from None


def _read_table(text: bytes) -> tuple[ParameterIndex, dict[str, str], list[tuple[str, int, int]]]:
    """Read the table, checking each value's type and range."""
    table = strict_json(text.decode())
    names, shapes, coders, streams = (table[key] for key in ("names", "shapes", "coders", "streams"))
    if not len(names) == len(shapes) == len(coders) == len(set(names)):
        raise ValueError("its names, shapes and coders do not pair up")
    if not all(isinstance(text, str) for text in [*names, *coders, *(coder for coder, _, _ in streams)]):
        raise ValueError("a name is no text")
    numbers = [n for shape in shapes for n in shape] + [n for _, count, size in streams for n in (count, size)]
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise ValueError("a size is no number of elements")
    index = ParameterIndex(dict(zip(names, shapes, strict=True)))
    if index.total >= 1 << 61:
        raise ValueError(f"it has {index.total} parameters")
    return index, dict(zip(names, coders, strict=True)), [(coder, count, size) for coder, count, size in streams]


def _decode(
    index: ParameterIndex, coders: Mapping[str, str], streams: list[tuple[str, int, int]], body: Array
) -> dict[str, Tensor | None]:
    used = {coder for coder in coders.values() if coder not in ("none", "all")}
    if sorted(used) != sorted(coder for coder, _, _ in streams) or sum(size for _, _, size in streams) != len(
        body
    ):
        raise ValueError(f"its streams do not fit {len(body)} bytes")
    empty = torch.empty(0, dtype=torch.int64)
    chosen: dict[str, Tensor | None] = {name: None if coders[name] == "all" else empty for name in index}
    end = 0
    for coder, count, size in streams:
        names = [name for name in index if coders[name] == coder]
        start, end = end, end + size
        if coder == "stairs":
            shapes = [stairs.matrix_shape(index.shapes[name], index.numel(name)) for name in names]
            parts = stairs.decode(body[start:end], shapes)
            if sum(map(len, parts)) != count:
                raise ValueError(f"its staircases hold {sum(map(len, parts))} coordinates instead of {count}")
        else:
            bounds = list(accumulate((index.numel(name) for name in names), initial=0))
            flat = rice.decode(body[start:end], count, int(coder.removeprefix("rice")), bounds[-1])
            cuts = [0, *np.searchsorted(flat, bounds[1:]).tolist()]
            parts = [flat[a:b] - first for a, b, first in zip(cuts, cuts[1:], bounds, strict=False)]
        chosen |= {name: torch.from_numpy(part) for name, part in zip(names, parts, strict=True)}
    return chosen
