"""Which coder each tensor of a mask gets: several ways are tried, the smallest is kept."""

from collections.abc import Mapping
from itertools import accumulate
from math import inf
from typing import NamedTuple

import numpy as np

from pipeline.masks import rice, stairs, varint
from pipeline.masks.table import Stream
from pipeline.parameters import ParameterIndex

Array = np.ndarray
RICE = {f"rice{r}h": r for r in range(48)}  # name -> parameter; h: partly under a Huffman code
_WAYS = (("rice",), ("rice", "stairs"), ("rice", "varint"), ("varint",), ("rice", "stairs", "varint"))
_NEAR = 1.1  # a way whose estimate is larger than the least one by this factor is not tried
_WORTH = 192  # bits a tensor must save to get a Rice stream of another parameter than most


class Coded(NamedTuple):
    """Partly chosen tensors, coded: name -> coder, and each stream with its bytes."""

    coders: dict[str, str]
    streams: list[Stream]
    codes: list[bytes]


class _Part(NamedTuple):
    """One tensor's coordinates as the coders take them, and the bytes each is expected to make of them.

    The last gap is that after the last coordinate.
    """

    flat: Array
    gaps: Array
    parameter: int
    bits: int
    stairs: stairs.Stairs | None
    expected: dict[str, float]


def smallest(index: ParameterIndex, partly: Mapping[str, Array], *, compact: bool) -> Coded:
    """Code coordinates in the smallest of the ways.

    Args:
        index: the parameters.
        partly: name -> int64 [k], k > 0, strictly increasing, within the tensor; in flat order.
        compact: False tries Rice's coder alone.

    Returns:
        The code.
    """
    parts = {name: _part(index, name, flat, compact) for name, flat in partly.items()}
    plans: dict[tuple[str, ...], float] = {}
    for way in _WAYS if compact else _WAYS[:1]:
        plan = tuple(min(way, key=part.expected.__getitem__) for part in parts.values())
        plans[plan] = sum(part.expected[coder] for part, coder in zip(parts.values(), plan, strict=True))
    found, least = None, inf
    for plan, expected in sorted(plans.items(), key=lambda item: item[1]):
        if expected <= _NEAR * least:
            coded = _coded(index, parts, dict(zip(parts, plan, strict=True)))
            if coded is not None:
                least = min(least, expected)
                found = coded if found is None or _size(coded) < _size(found) else found
    assert found is not None  # Rice's coder takes anything
    return found


def _size(coded: Coded) -> int:
    return sum(map(len, coded.codes))


def _part(index: ParameterIndex, name: str, flat: Array, compact: bool) -> _Part:
    # What follows the last coordinate is part of the next tensor's first gap, hence of this one's cost.
    gaps = np.append(rice.gaps_of(flat), index.numel(name) - 1 - flat[-1])
    parameter, bits = rice.best_parameter(gaps)
    expected = {"rice": bits / 8, "stairs": inf, "varint": inf}
    apart = None
    if compact:
        apart = stairs.take_apart(flat, stairs.matrix_shape(index.shapes[name], index.numel(name))[1])
        expected |= {"rice": len(rice.encode(gaps, parameter)), "varint": varint.estimate(gaps)}
        if apart is not None:
            expected["stairs"] = stairs.estimate(apart)
    return _Part(flat, gaps, parameter, bits, apart, expected)


def _coded(index: ParameterIndex, parts: Mapping[str, _Part], coders: dict[str, str]) -> Coded | None:
    """Code each tensor by its coder, or tell by None that a reader would refuse what one of them makes."""
    riced = [name for name, coder in coders.items() if coder == "rice"]
    if riced:
        most, _ = rice.best_parameter(np.concatenate([parts[name].gaps for name in riced]))
        for name in riced:
            saved = rice.code_bits(parts[name].gaps, most) - parts[name].bits
            coders[name] = f"rice{parts[name].parameter if saved > _WORTH else most}h"
    streams, codes = [], []
    for coder in sorted(set(coders.values())):
        own = {name: parts[name] for name, its in coders.items() if its == coder}
        if coder == "stairs":
            code = stairs.encode([part.stairs for part in own.values() if part.stairs is not None])
        else:
            starts = accumulate((index.numel(name) for name in own), initial=0)
            flat = [part.flat + start for part, start in zip(own.values(), starts, strict=False)]
            gaps = rice.gaps_of(np.concatenate(flat))
            code = varint.encode(gaps) if coder == "varint" else rice.encode(gaps, RICE[coder])
        if code is None:
            return None
        streams.append(Stream(coder, sum(len(part.flat) for part in own.values()), len(code)))
        codes.append(code)
    return Coded(coders, streams, codes)
