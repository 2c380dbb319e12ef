"""Exact global top-k over many tensors in bounded memory.

The order is total: a larger score first, and among equal scores the lower flat coordinate. The k first
coordinates of that order are the selection, so selections of growing k are nested and nothing depends on how
scores are cut into chunks.

Recipe: a value known to lie below the k-th is found from a strided sample; one pass collects what reaches it,
and the selection is finished exactly among those few. Where the sample misleads (many ties, odd layouts) the
k-th value is found by a histogram over the bits of the scores instead, which is slower and never wrong.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import ParamsError

# One value in 499 is sampled: a prime, so that no row length of a weight makes it hit the same columns.
_STRIDE = 499
_SMALL = 1 << 17  # below this many scores a sample is not worth its pass
_CHUNK = 1 << 17  # scores looked at in one step: the working memory on a CPU, inside its cache
_CHUNK_GPU = 1 << 24  # larger on an accelerator, where each step waits for one answer
_DIGIT = 16  # bits per histogram level of the fallback


class _Scores(NamedTuple):
    """The scores as they are read: flat tensors, the dtype they are compared in, and whether by magnitude."""

    flat: dict[str, Tensor]
    dtype: torch.dtype
    absolute: bool

    def read(self, part: Tensor) -> Tensor:
        part = part.to(self.dtype)
        return part.abs() if self.absolute else part

    def chunks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Cut a tensor into (first coordinate, chunk)."""
        tensor = self.flat[name]
        size = _CHUNK if tensor.device.type == "cpu" else _CHUNK_GPU
        for start in range(0, tensor.numel(), size):
            yield start, self.read(tensor[start : start + size])


def top_coordinates(scores: Mapping[str, Tensor], k: int, *, absolute: bool = False) -> dict[str, Tensor]:
    """Find the coordinates of the k largest scores over all tensors.

    Args:
        scores: name -> non-negative finite floats of any shape and float dtype, on any device, in flat order.
        k: how many, 0..n.
        absolute: rank by absolute value; scores may be negative then.

    Returns:
        name -> sorted int64 [count] coordinates within that tensor, on the CPU; every name has an entry.

    Raises:
        ParamsError: if a score is NaN, infinite or negative, or not a float; the message names the tensor.
    """
    for name, score in scores.items():
        if not score.is_floating_point():
            raise ParamsError(f"scores of tensor '{name}' are {score.dtype}; expected floats")
    flat = {name: score.detach().reshape(-1) for name, score in scores.items()}
    wide = torch.float64 if any(t.dtype == torch.float64 for t in flat.values()) else torch.float32
    source = _Scores(flat, wide, absolute)
    found = _collect(source, _sampled_floor(source, k), limit=max(4 * k, _SMALL) + _SMALL)
    if found is None or found[0].numel() < k:
        return _above(source, *_kth_by_bits(source, k))
    values, coordinates, counts = found
    return dict(zip(flat, _finish(values, coordinates, counts, k), strict=True))


def _sampled_floor(source: _Scores, k: int) -> float:
    """Guess a value that a little more than k scores reach; 0 (all of them) where n is small."""
    total = sum(t.numel() for t in source.flat.values())
    if total <= _SMALL or 2 * k >= total:
        return 0.0
    picked, skip = [], 0
    for tensor in source.flat.values():  # every 499th of the flat space, whatever the tensors' sizes
        if skip < tensor.numel():
            picked.append(source.read(tensor[skip::_STRIDE]).cpu())
        skip = (skip - tensor.numel()) % _STRIDE
    sample = torch.cat(picked)
    expected = k * sample.numel() / total
    rank = int(expected + 6.0 * sqrt(expected)) + 12  # far enough down that more than k reach it, nearly always
    if rank >= sample.numel():
        return 0.0
    return float(sample.kthvalue(sample.numel() - rank).values)


def _collect(source: _Scores, floor: float, limit: int) -> tuple[Tensor, Tensor, list[int]] | None:
    """Collect all (score, coordinate) pairs that reach ``floor``, checking every score on the way.

    Returns:
        Values, coordinates within their tensors, and how many each tensor gave; None if more than ``limit``.
    """
    values: list[Tensor] = []
    coordinates: list[Tensor] = []
    counts, found, full = [], 0, False
    flags = np.empty(_CHUNK, dtype=bool)
    for name in source.flat:
        before = found
        for start, chunk in source.chunks(name):
            if _check(name, chunk) < floor or full:
                continue
            at = _reaching(chunk, floor, flags)
            found += at.numel()
            full = found > limit  # go on checking the remaining scores, but keep no more of them
            if not full:
                values.append(chunk[at].cpu())
                coordinates.append(at.cpu() + start)
        counts.append(found - before)
    if full:
        return None
    empty = torch.empty(0, dtype=torch.int64)
    return torch.cat([empty.to(source.dtype), *values]), torch.cat([empty, *coordinates]), counts


def _check(name: str, chunk: Tensor) -> float:
    """Refuse scores that cannot be ranked.

    Returns:
        The largest score of the chunk.

    Raises:
        ParamsError: if one is NaN, infinite or negative.
    """
    if chunk.device.type == "cpu":
        array = chunk.numpy()
        low, high = float(array.min()), float(array.max())  # several times faster than torch.aminmax here
    else:
        low, high = torch.stack(torch.aminmax(chunk)).tolist()
    if low >= 0.0 and high < float("inf"):
        return high
    what = "a negative value" if low < 0.0 else "an infinite value" if high == float("inf") else "NaN"
    raise ParamsError(f"scores of tensor '{name}' hold {what}; expected finite, non-negative numbers")


def _reaching(chunk: Tensor, floor: float, flags: np.ndarray) -> Tensor:
    """Find where a chunk reaches ``floor``; ``flags`` is room for the answers, which saves page faults."""
    if chunk.device.type != "cpu":
        return _nonzero(chunk >= floor)
    array = chunk.numpy()
    np.greater_equal(array, array.dtype.type(floor), out=flags[: len(array)])
    return torch.from_numpy(np.flatnonzero(flags[: len(array)]))


def _nonzero(flags: Tensor) -> Tensor:
    if flags.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(flags.numpy()))
    return flags.nonzero().reshape(-1)


def _finish(values: Tensor, coordinates: Tensor, counts: Sequence[int], k: int) -> list[Tensor]:
    """Keep exactly the k largest of the collected pairs, which stand in flat order."""
    keep = torch.zeros(values.numel(), dtype=torch.bool)
    if k:
        kth = values.kthvalue(values.numel() - k + 1).values
        keep |= values > kth
        ties = _nonzero(values == kth)
        keep[ties[: k - int(keep.sum())]] = True
    parts = zip(keep.split(list(counts)), coordinates.split(list(counts)), strict=True)
    return [part[flags] for flags, part in parts]


def _kth_by_bits(source: _Scores, k: int) -> tuple[float, int]:
    """Find the k-th largest score by its bits: non-negative floats order like their bit patterns.

    Each level histograms the next 16 bits of the scores that share the digits fixed so far.

    Returns:
        The k-th largest score, and how many scores equal to it belong to the k largest.
    """
    if k == 0:
        return float("inf"), 0
    width, integer = (32, torch.int32) if source.dtype == torch.float32 else (64, torch.int64)
    prefix, wanted = 0, k
    for shift in range(width - _DIGIT, -1, -_DIGIT):
        histogram = torch.zeros(1 << _DIGIT, dtype=torch.int64)
        for name in source.flat:
            for _, chunk in source.chunks(name):
                bits = chunk.abs().view(integer)  # abs: -0.0 would rank as the largest
                if shift + _DIGIT < width:
                    bits = bits[(bits >> (shift + _DIGIT)) == prefix]
                histogram += torch.bincount((bits >> shift) & 0xFFFF, minlength=1 << _DIGIT).cpu()
        above = histogram.flip(0).cumsum(0).flip(0)  # how many have this digit or a larger one
        digit = int((above >= wanted).nonzero().max())
        wanted -= int(above[digit]) - int(histogram[digit])
        prefix = (prefix << _DIGIT) | digit
    return float(torch.tensor(prefix, dtype=integer).view(source.dtype)), wanted


def _above(source: _Scores, value: float, ties: int) -> dict[str, Tensor]:
    """Take every coordinate whose score exceeds ``value``, and the first ``ties`` of those that equal it."""
    chosen = {}
    for name in source.flat:
        parts = [torch.empty(0, dtype=torch.int64)]
        for start, chunk in source.chunks(name):
            flags = chunk > value
            if ties:
                equal = _nonzero(chunk == value)[:ties]
                flags[equal] = True
                ties -= equal.numel()
            parts.append(_nonzero(flags).cpu() + start)
        chosen[name] = torch.cat(parts)
    return chosen
