"""Streams of bytes in a coded section, each written in the smallest way that a reader accepts.

A stream is raw, deflate (Huffman alone, or with runs) or LZMA. It starts with a byte that says which and, unless
raw, its size in four. Its length when expanded is known from elsewhere and bounded by 1024 times its size, so that
a few bytes cannot claim memory without end.
"""

import lzma
import zlib

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray
_RATIO, _SPARE = 1024, 1 << 16  # a stream expands to at most _RATIO times its bytes, or to _SPARE bytes
_FILTERS = [{"id": lzma.FILTER_LZMA1, "preset": 6, "dict_size": 1 << 20, "lc": 0, "lp": 0, "pb": 0}]
_PLAIN, _DEFLATE, _LZMA = range(3)


def squeeze(data: bytes, thorough: bool = True) -> bytes:
    """Write a stream.

    Args:
        data: the bytes.
        thorough: try LZMA too, which reads and writes a few MB a second.

    Returns:
        The stream.
    """
    best = bytes([_PLAIN]) + data
    ways = []
    for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE):
        deflate = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS, 6, strategy)
        ways.append((_DEFLATE, deflate.compress(data) + deflate.flush()))
    if thorough and min(len(code) for _, code in ways) < 0.98 * len(
        data
    ):  # not on noise, which most bytes of floats are
        ways.append((_LZMA, lzma.compress(data, lzma.FORMAT_RAW, filters=_FILTERS)))
    for kind, code in ways:
        if len(code) + 5 < len(best) and len(data) <= _RATIO * len(code) + _SPARE:
            best = bytes([kind]) + len(code).to_bytes(4, "little") + code
    return best


class Reader:
    """Reads a coded section from its start to its end; a ValueError where it is not as expected.

    Args:
        section: uint8 [bytes].
        coder: how it is said to be coded.
        expected: how it must be.
    """

    def __init__(self, section: Tensor, coder: str, expected: str) -> None:
        if coder != expected or section.dtype != torch.uint8 or section.ndim != 1:
            raise ValueError(
                f"it is {section.dtype} {list(section.shape)} coded as {coder!r}; expected {expected}"
            )
        self._code = section.numpy()
        self._at = 0

    def take(self, count: int) -> Array:
        """Read bytes.

        Args:
            count: how many.

        Returns:
            uint8 [count].

        Raises:
            ValueError: if there are fewer.
        """
        if count > len(self._code) - self._at:
            raise ValueError(f"it ends after {len(self._code)} bytes; {count} more are expected at {self._at}")
        self._at += count
        return self._code[self._at - count : self._at]

    def stream(self, length: int) -> Array:
        """Read a stream.

        Args:
            length: the bytes that it holds.

        Returns:
            uint8 [length].

        Raises:
            ValueError: if it holds anything else.
        """
        kind = int(self.take(1)[0])
        if kind == _PLAIN:
            return self.take(length)
        code = self.take(int.from_bytes(self.take(4).tobytes(), "little")).tobytes()
        if kind > _LZMA or length > _RATIO * len(code) + _SPARE:
            raise ValueError(f"a stream of kind {kind} has {len(code)} bytes and claims to expand to {length}")
        try:
            data, surplus = (_inflated if kind == _DEFLATE else _unpacked)(code, length)
        except (zlib.error, lzma.LZMAError) as error:
            raise ValueError(f"a stream does not expand ({error})") from None
        if len(data) != length or surplus:
            raise ValueError(f"a stream does not expand to {length} bytes")
        return np.frombuffer(data, np.uint8)

    def end(self) -> None:
        """Check that nothing is left.

        Raises:
            ValueError: if something is.
        """
        if self._at != len(self._code):
            raise ValueError(f"it has {len(self._code) - self._at} bytes after its end")


def _inflated(code: bytes, length: int) -> tuple[bytes, bool]:
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    data = stream.decompress(code, length) if length else b""
    more = stream.decompress(stream.unconsumed_tail if length else code, 1)
    return data, bool(more or stream.unused_data or not stream.eof)


def _unpacked(code: bytes, length: int) -> tuple[bytes, bool]:
    stream = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS)
    data = stream.decompress(code, max_length=length) if length else b""
    return data, not stream.eof and bool(stream.decompress(b"", max_length=1))
