"""Golomb-Rice coding of increasing coordinates, whole arrays at a time, its skewed parts by a Huffman code.

The gap g >= 0 before each coordinate is split at bit r: the quotient g >> r in unary (that many zeros and a one),
the r low bits as they are. Gaps of a uniform choice are geometric, for which this is within about 1 % of the
entropy. Most of that 1 % is in the highest of the low bits, which is 0 more often than 1, and, where most elements
are chosen, in the unary bits: eight of either make a symbol of DEFLATE, used as a Huffman code alone.

Layout, for k coordinates: the lower r - 1 bit planes of ceil(k / 8) bytes, lowest bit first; then, deflated, the
highest plane and the unary bits. Planes rather than codes in a row let numpy unpack all coordinates at once.
"""

import zlib

import numpy as np

Array = np.ndarray


def gaps_of(coordinates: Array) -> Array:
    """Count the unchosen elements before each coordinate.

    Args:
        coordinates: int64 [k], strictly increasing, from 0.

    Returns:
        int64 [k], non-negative.
    """
    return np.diff(coordinates, prepend=-1) - 1


def best_parameter(gaps: Array) -> tuple[int, int]:
    """Find the r that codes these gaps in the fewest bits.

    Returns:
        r, and the bits of the code.
    """
    # The optimum of a geometric is near log2(ln 2 · mean); the search around it serves other distributions.
    guess = int(0.7 * float(gaps.mean())).bit_length() if len(gaps) else 0
    return min(((r, code_bits(gaps, r)) for r in range(max(guess - 4, 0), guess + 3)), key=lambda pair: pair[1])


def code_bits(gaps: Array, r: int) -> int:
    """Count the bits of the code of these gaps.

    Returns:
        k (r + 1) + Σ (g >> r).
    """
    return len(gaps) * (r + 1) + int((gaps >> r).sum())


def encode(gaps: Array, r: int) -> bytes:
    """Code gaps, int64 [k].

    Returns:
        The planes and the unary bits.
    """
    planes = [np.packbits(((gaps >> bit) & 1).astype(np.uint8)).tobytes() for bit in range(r)]
    ones = np.cumsum((gaps >> r) + 1) - 1
    unary = np.zeros(int(ones[-1]) + 1 if len(ones) else 0, dtype=np.uint8)
    unary[ones] = 1
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    for part in planes[-1:]:  # with a Huffman table of its own
        planes[-1] = packer.compress(part) + packer.flush(zlib.Z_BLOCK)
    return b"".join([*planes, packer.compress(np.packbits(unary).tobytes()), packer.flush()])


def decode(code: Array, count: int, r: int, limit: int) -> Array:
    """Decode coordinates; memory is bounded by that of 64 coordinates per byte of code.

    Args:
        code: uint8, the planes and the unary bits.
        count: k, the coordinates it holds.
        r: its parameter.
        limit: the number of elements; all coordinates lie below it.

    Returns:
        int64 [k], strictly increasing, within 0..limit-1.

    Raises:
        ValueError: if the code does not hold exactly that.
    """
    width = (count + 7) // 8
    plain = max(r - 1, 0) * width
    # Each coordinate has a one among the unary bits, so a claimed count is bounded by real bytes.
    if not 0 <= r < 48 or plain > len(code) or count > 64 * len(code) or (count << r) + limit >= 1 << 62:
        raise ValueError(f"{count} coordinates at parameter {r} do not fit {len(code)} bytes")
    skewed = _inflate(code[plain:])
    top = width if r else 0
    unary = skewed[top:]
    ones = np.flatnonzero(np.unpackbits(unary).view(bool))
    if len(ones) != count or len(unary) != (int(ones[-1]) // 8 + 1 if count else 0):
        raise ValueError(f"it holds {len(ones)} coordinates instead of {count}")
    ordinals = np.arange(count)
    quotients = ones - ordinals  # the sum of the quotients so far
    if count and int(quotients[-1]) > limit >> r:
        raise ValueError("a coordinate lies outside its tensor")
    low = np.zeros(count, dtype=np.min_scalar_type((1 << r) - 1 if r else 0))
    for bit in range(r):
        packed = skewed[:top] if bit == r - 1 else code[bit * width : (bit + 1) * width]
        low |= np.unpackbits(packed, count=count).astype(low.dtype) << low.dtype.type(bit)
    coordinates = (quotients << r) + np.cumsum(low, dtype=np.int64) + ordinals
    if count and int(coordinates[-1]) >= limit:
        raise ValueError("a coordinate lies outside its tensor")
    return coordinates


def _inflate(code: Array) -> Array:
    """Undo DEFLATE, to uint8; a Huffman code spends a bit or more on each byte, and no more is taken."""
    stream = zlib.decompressobj(-15)
    try:
        data = stream.decompress(code.tobytes(), 8 * len(code) + 1)
    except zlib.error as error:
        raise ValueError(f"it does not inflate ({error})") from None
    if not stream.eof or stream.unused_data:
        raise ValueError("its Huffman code does not end where it should")
    return np.frombuffer(data, dtype=np.uint8)
