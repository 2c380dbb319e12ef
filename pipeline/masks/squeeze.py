"""Integers and bytes under LZMA, within bounds that keep a few bytes from claiming memory without end.

``pack_integers`` writes LEB128, ``squeeze`` compresses. A reader expands up to ``bound`` of the code and no
further; a writer whose data is beyond it codes otherwise.
"""

import lzma

import numpy as np

Array = np.ndarray
_RATIO = 1024  # bytes out per byte in
_SPARE = 1 << 16  # ... and this many for nothing
_FILTERS = [{"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 20, "lc": 0, "pb": 0}]


def bound(code: bytes | Array) -> int:
    """Bound what a reader makes of a code.

    Returns:
        Bytes, or cells of matrices.
    """
    return _RATIO * len(code) + _SPARE


def squeeze(data: bytes) -> bytes:
    """Compress by LZMA, end marker included. ``expand`` takes it back if ``data`` is within ``bound``.

    Returns:
        The code.
    """
    return lzma.compress(data, lzma.FORMAT_RAW, filters=_FILTERS)


def expand(code: bytes) -> bytes:
    """Expand what ``squeeze`` wrote, within ``bound``.

    Returns:
        The data.

    Raises:
        ValueError: if it does not end, or does so beyond the bound or before the code does.
    """
    stream = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS)
    try:
        data = stream.decompress(code, max_length=bound(code) + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"it does not expand ({error})") from None
    if len(data) > bound(code):
        raise ValueError(f"{len(code)} bytes expand to more than the {bound(code)} allowed")
    if not stream.eof or stream.unused_data:
        raise ValueError("it ends before its code does" if stream.eof else "it is cut off")
    return data


def pack_integers(values: Array) -> bytes:
    """Write non-negative int64 values as LEB128: seven bits a byte, lowest first, the top bit where more follow.

    Returns:
        The bytes.
    """
    sizes = np.ones(len(values), dtype=np.int64)
    for shift in range(7, 63, 7):
        sizes += values >> shift > 0
    starts = np.cumsum(sizes) - sizes
    out = np.empty(int(sizes.sum()), dtype=np.uint8)
    for byte in range(int(sizes.max(initial=0))):
        some = sizes > byte
        more = (sizes[some] > byte + 1).astype(np.int64) << 7
        out[starts[some] + byte] = ((values[some] >> (7 * byte)) & 127) | more
    return out.tobytes()


def unpack_integers(data: bytes) -> Array:
    """Read what ``pack_integers`` wrote.

    Returns:
        int64 values, non-negative.

    Raises:
        ValueError: if the last one is cut off or one has more than 63 bits.
    """
    octets = np.frombuffer(data, dtype=np.uint8)
    ends = np.flatnonzero(octets < 128)
    if len(octets) and (len(ends) == 0 or ends[-1] != len(octets) - 1):
        raise ValueError("an integer is cut off")
    if len(ends) == len(octets):
        return octets.astype(np.int64)
    sizes = np.diff(ends, prepend=-1)
    longest = int(sizes.max(initial=1))
    if longest > 9:
        raise ValueError("an integer is too long")
    starts = ends - sizes + 1
    values = (octets[starts] & 127).astype(np.int64)
    for byte in range(1, longest):
        some = np.flatnonzero(sizes > byte)
        values[some] |= (octets[starts[some] + byte] & 127).astype(np.int64) << (7 * byte)
    return values
