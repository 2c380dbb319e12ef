"""Rows of values as bytes, without loss: as they are, in byte planes, or as residuals against a base's values.

    raw         the values in their dtype
    planes      byte i of every value next to each other, a float's bits first turned left by one, so that its
                exponent fills a byte and its sign is the last bit
    residuals   what a prediction (prediction.py) from the base's values misses, in units in the last place

A residual is the difference of two bit patterns, mapped so that neighbours among the values are neighbours among
the integers (-0.0 is -1, next to 0.0), modulo 2^width and folded to 0, 1, 2, ... for 0, -1, 1, ...: any bits, NaN
and infinity included, come back. It is a token, its length and its leading bits, and the bits below, which are
noise. Tokens stand in the order of the predictions' exponents: where training moved all values of a tensor about
as far, residuals of one exponent are about equally long. The reader has the base, hence the order.

Values are coded in blocks of 2^20, each of a few streams (streams.py).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.deltas.prediction import Factors, Place, predict, read_factors, write_factors
from pipeline.deltas.streams import Reader, squeeze
from pipeline.parameters import byte_view

RAW, PLANES, RESIDUALS = "raw", "planes", "residuals"
Array = np.ndarray
_BLOCK = 1 << 20  # values: bounds the memory of coding
_LEADING = {1: 7, 2: 4, 4: 3, 8: 2}  # bytes of a value -> bits of a residual in its token, after the first one
_MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 52}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def encode(values: Tensor) -> tuple[str, Tensor]:
    """Code a row of values on their own.

    Args:
        values: [count], of any dtype that files hold, on the CPU.

    Returns:
        The coder and the section: uint8, or the values themselves where coding does not make them smaller.
    """
    parts = []
    for block in _blocks(values.numel()):
        bits = _turned(_bits(values[block]), values.dtype)
        planes = bits.view(np.uint8).reshape(len(bits), -1).T
        parts += [squeeze(plane.tobytes(), values.numel() <= _BLOCK) for plane in planes]
    return _smaller(PLANES, parts, values)


def decode(section: Tensor, coder: str, dtype: torch.dtype, count: int) -> Tensor:
    """Read what ``encode`` wrote; memory is bounded by 1024 times the section.

    Returns:
        [count] values of the dtype.

    Raises:
        ValueError: if the section is not exactly that.
    """
    if coder == RAW:
        if section.dtype != dtype or tuple(section.shape) != (count,):
            raise ValueError(f"it is {section.dtype} {list(section.shape)}; expected {count} of {dtype}")
        return section
    code = Reader(section, coder, PLANES)
    blocks = []
    for block in _blocks(count):
        size = block.stop - block.start
        planes = [code.stream(size) for _ in range(dtype.itemsize)]
        bits = np.ascontiguousarray(np.stack(planes, axis=1)).reshape(-1).view(_UNSIGNED[dtype.itemsize])
        blocks.append(_turned(bits, dtype, back=True))
    code.end()
    return _values(blocks, dtype)


def encode_against(values: Tensor, base: Tensor, places: Sequence[Place]) -> tuple[str, Tensor]:
    """Code a row of values against those of a base.

    Args:
        values: [count], on the CPU.
        base: the base's, likewise.
        places: where in its tensor each stretch of the row stands, in order.

    Returns:
        The coder and the section, as ``encode``.
    """
    factors, predicted = write_factors(values, base, places)
    parts = [factors]
    for block in _blocks(values.numel()):
        bits, order = _bits(predicted[block]), _order(predicted[block])
        residuals = _residuals(_bits(values[block]), bits, values.dtype)[order]
        tokens, below = _tokens(residuals)
        parts += [squeeze(tokens.tobytes(), values.numel() <= _BLOCK), _pack(residuals, below)]
    return _smaller(RESIDUALS, parts, values)


class Residuals(NamedTuple):
    """A row of residuals: a section read and checked as far as the base is not needed for it.

    Attributes:
        factors: of the predictions.
        blocks: the residuals of each block, in the order of the predictions' exponents.
    """

    factors: Factors
    blocks: list[Array]


def read_residuals(section: Tensor, coder: str, dtype: torch.dtype, places: Sequence[Place]) -> Residuals:
    """Read what ``encode_against`` wrote, unless raw, as far as that can be done without the base.

    Args:
        section: uint8.
        coder: how it is said to be coded.
        dtype: of the values.
        places: as in ``encode_against``.

    Returns:
        What ``restore`` takes.

    Raises:
        ValueError: if the section does not hold exactly one residual for each value.
    """  # noqa: DOC502 - raised by what it calls
    code = Reader(section, coder, RESIDUALS)
    factors = read_factors(code.take, dtype, places)
    blocks = []
    for block in _blocks(sum(place.held for place in places)):
        leading, below = _untokened(code.stream(block.stop - block.start), np.dtype(_UNSIGNED[dtype.itemsize]))
        blocks.append(_unpack(code, leading, below))
    code.end()
    return Residuals(factors, blocks)


def restore(held: Residuals, base: Tensor, places: Sequence[Place]) -> Tensor:
    """Put residuals on top of what the base predicts.

    Args:
        held: the residuals.
        base: the base's values [count], of the dtype that they were read for, on the CPU.
        places: as in ``encode_against``.

    Returns:
        [count] values of the base's dtype.

    Raises:
        ValueError: if a value is none of its dtype.
    """  # noqa: DOC502 - raised by what it calls
    predicted = predict(base, places, held.factors)
    blocks = []
    for block, sorted_residuals in zip(_blocks(base.numel()), held.blocks, strict=True):
        residuals = np.empty_like(sorted_residuals)
        residuals[_order(predicted[block])] = sorted_residuals
        blocks.append(_restored(residuals, _bits(predicted[block]), base.dtype))
    return _values(blocks, base.dtype)


def decode_against(section: Tensor, coder: str, base: Tensor, places: Sequence[Place]) -> Tensor:
    """Read what ``encode_against`` wrote.

    Returns:
        [count] values of the base's dtype.

    Raises:
        ValueError: if the section is not exactly that.
    """  # noqa: DOC502 - raised by what it calls
    if coder == RAW:
        return decode(section, coder, base.dtype, base.numel())
    return restore(read_residuals(section, coder, base.dtype, places), base, places)


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK))


def _smaller(coder: str, parts: list[bytes], values: Tensor) -> tuple[str, Tensor]:
    """The coded section, or the values where they are no larger or there are none."""
    code = b"".join(parts)
    if len(code) >= values.numel() * values.element_size():
        return RAW, values
    return coder, torch.frombuffer(bytearray(code), dtype=torch.uint8)


def _bits(values: Tensor) -> Array:
    """The bit patterns of values, unsigned."""
    return byte_view(values).numpy().view(_UNSIGNED[values.element_size()])


def _values(blocks: list[Array], dtype: torch.dtype) -> Tensor:
    flat = np.concatenate(blocks) if blocks else np.empty(0, _UNSIGNED[dtype.itemsize])
    if dtype == torch.bool and flat.size and flat.max() > 1:
        raise ValueError("a boolean is neither 0 nor 1")
    return torch.from_numpy(flat if flat.itemsize == 1 else flat.view(f"i{flat.itemsize}")).view(dtype)


def _turned(bits: Array, dtype: torch.dtype, back: bool = False) -> Array:
    """Turn a float's bits left by one, its sign to the end, or back; integers stay."""
    if not dtype.is_floating_point:
        return bits
    one, rest = bits.dtype.type(1), bits.dtype.type(8 * bits.itemsize - 1)
    turned: Array = (bits >> one) | (bits << rest) if back else (bits << one) | (bits >> rest)
    return turned


def _ordered(bits: Array, dtype: torch.dtype) -> Array:
    """Map a float's bits to integers in the order of the values, and back: the map is its own inverse."""
    if not dtype.is_floating_point:
        return bits
    signed = bits.view(f"i{bits.itemsize}")
    below = (signed >> (8 * bits.itemsize - 1)).view(bits.dtype) >> bits.dtype.type(1)  # all but the sign
    flipped: Array = bits ^ below
    return flipped


def _residuals(bits: Array, predicted: Array, dtype: torch.dtype) -> Array:
    """Subtract in order, modulo 2^width, and fold: 0, -1, 1, -2, ... -> 0, 1, 2, 3, ..."""
    signed = (_ordered(bits, dtype) - _ordered(predicted, dtype)).view(f"i{bits.itemsize}")
    folded: Array = (signed << 1) ^ (signed >> (8 * bits.itemsize - 1))
    return folded.view(bits.dtype)


def _restored(residuals: Array, predicted: Array, dtype: torch.dtype) -> Array:
    one = residuals.dtype.type(1)
    unfolded = (residuals >> one) ^ (~(residuals & one) + one)
    return _ordered(_ordered(predicted, dtype) + unfolded, dtype)


def _order(predicted: Tensor) -> Array:
    """Sort predictions by exponent, equal ones staying in order: positions [count]."""
    if predicted.dtype not in _MANTISSA:
        return np.arange(predicted.numel())
    bits = _bits(predicted)
    exponents = (bits << bits.dtype.type(1)) >> bits.dtype.type(1 + _MANTISSA[predicted.dtype])
    return np.argsort(exponents.astype(np.uint16), kind="stable")


def _length(numbers: Array) -> Array:
    """Count the binary digits of unsigned integers; 0 has none."""
    if numbers.itemsize < 8:
        return np.frexp(numbers.astype(np.float64))[1]
    high = numbers >> np.uint64(32)
    low = (numbers & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    return np.where(high > 0, 32 + _length(high.astype(np.uint32)), _length(low))


def _tokens(residuals: Array) -> tuple[Array, Array]:
    """Take the leading bits: uint8 tokens, and how many bits are left below them."""
    leading = _LEADING[residuals.itemsize]
    below = np.maximum(_length(residuals) - 1 - leading, 0).astype(residuals.dtype)
    return ((below << residuals.dtype.type(leading)) + (residuals >> below)).astype(np.uint8), below


def _untokened(tokens: Array, dtype: np.dtype) -> tuple[Array, Array]:
    """Leading bits in place, and how many are missing below them."""
    leading = _LEADING[dtype.itemsize]
    first = 1 << leading
    below = np.maximum((tokens >> leading).astype(np.int8) - 1, 0).astype(dtype)
    if below.size and int(below.max()) > 8 * dtype.itemsize - 1 - leading:
        raise ValueError("a residual is wider than its value")
    head = np.where(tokens < first, tokens, (tokens & (first - 1)) + first).astype(dtype)
    return head << below, below


def _pack(residuals: Array, below: Array) -> bytes:
    """Store the bits below the tokens: whole bytes, lowest first, then the bits left over."""
    parts = []
    for byte in range(residuals.itemsize):
        chosen = residuals[below >= 8 * (byte + 1)]
        parts.append((chosen >> chosen.dtype.type(8 * byte)).astype(np.uint8).tobytes())
    rest, top = below & below.dtype.type(7), residuals >> (below & ~below.dtype.type(7))
    bits = [((top[rest > bit] >> top.dtype.type(bit)) & top.dtype.type(1)).astype(np.uint8) for bit in range(7)]
    return b"".join(parts) + np.packbits(np.concatenate(bits)).tobytes()


def _unpack(code: Reader, residuals: Array, below: Array) -> Array:
    """Fill the bits below the tokens in, in place."""
    kind = residuals.dtype.type
    for byte in range(residuals.itemsize):
        chosen = np.flatnonzero(below >= 8 * (byte + 1))
        residuals[chosen] |= code.take(len(chosen)).astype(kind) << kind(8 * byte)
    rest, start = below & kind(7), below & ~kind(7)
    places = [np.flatnonzero(rest > bit) for bit in range(7)]
    total = sum(map(len, places))
    bits = np.unpackbits(code.take((total + 7) // 8))
    if bits[total:].any():
        raise ValueError("bits are set after its end")
    end = 0
    for bit, chosen in enumerate(places):
        begin, end = end, end + len(chosen)
        residuals[chosen] |= bits[begin:end].astype(kind) << (start[chosen] + kind(bit))
    return residuals
