"""Delta-varint coding: the gaps before increasing coordinates as LEB128 integers under LZMA.

It suits coordinates that repeat a pattern along the rows: blocks, bands, kernels, every n-th element.
"""

import zlib

import numpy as np

from pipeline.masks.squeeze import bound, expand, pack_integers, squeeze, unpack_integers

Array = np.ndarray


def estimate(gaps: Array) -> int:
    """Estimate the bytes that gaps add to a stream.

    Args:
        gaps: int64 [k], non-negative.

    Returns:
        What DEFLATE makes of them alone, which is quick and a little more.
    """
    return len(zlib.compress(pack_integers(gaps), 6, -15))


def encode(gaps: Array) -> bytes | None:
    """Code gaps, int64 [k].

    Returns:
        The code, or None if it is so small that a reader would refuse what it expands to.
    """
    data = pack_integers(gaps)
    code = squeeze(data)
    return code if len(data) <= bound(code) else None


def decode(code: Array, count: int, limit: int) -> Array:
    """Decode coordinates; memory is bounded by that of ``expand``.

    Args:
        code: uint8.
        count: k, the coordinates it holds.
        limit: the number of elements; all coordinates lie below it.

    Returns:
        int64 [k], strictly increasing, within 0..limit-1.

    Raises:
        ValueError: if the code does not hold exactly that.
    """
    gaps = unpack_integers(expand(code.tobytes()))
    if len(gaps) != count:
        raise ValueError(f"it holds {len(gaps)} coordinates instead of {count}")
    # A float sum first: beyond any mask's size is where sums of int64 could wrap.
    if gaps.sum(dtype=np.float64) >= 2.0**62 or int(gaps.sum()) + count > limit:
        raise ValueError("a coordinate lies outside its tensor")
    return np.asarray(np.cumsum(gaps + 1) - 1)
