"""Coding of values: any bits come back, hostile bytes are refused, and what training leaves becomes smaller."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.deltas import streams
from pipeline.deltas import values as coding
from pipeline.deltas.prediction import Place, write_factors
from pipeline.deltas.target import same_bits

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DTYPES = [*FLOATS, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool]
SPECIAL = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 6e-8, 1.0, -1.0]


def any_bits(dtype: torch.dtype, count: int, seed: int) -> Tensor:
    """Every bit drawn: NaN payloads, denormals, infinities. Half of them small; special values first."""
    draw = np.random.default_rng(seed)
    if dtype == torch.bool:
        return torch.from_numpy(draw.random(count) < 0.5)
    drawn = draw.integers(0, 256, (count + 1) * dtype.itemsize, dtype=np.uint8)
    bits = torch.from_numpy(drawn).view(dtype)[:count].clone()
    if dtype.is_floating_point:
        small = torch.from_numpy(draw.normal(0, 0.05, count)).to(dtype)
        bits = torch.where(torch.from_numpy(draw.random(count) < 0.5), small, bits)
        special = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype)
        bits[: len(special)] = special[:count]
    return bits


def near(base: Tensor, seed: int, scale: float) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    if not base.dtype.is_floating_point:
        moved = base.long() + torch.randint(-3, 4, base.shape, generator=draw)
        return moved.to(base.dtype)
    return (base.double() + scale * torch.randn(base.shape, generator=draw, dtype=torch.float64)).to(base.dtype)


def places_of(count: int, seed: int) -> list[Place]:
    """Cut a row of values into a vector, a whole matrix and a sparse one."""
    first, second = count // 5, count // 3
    rest = count - first - second
    at = np.sort(np.random.default_rng(seed).choice(3 * rest + 3, rest, replace=False))
    return [
        Place((first,), None, first),
        Place((1, second), None, second),
        Place((3, rest + 1), torch.from_numpy(at), rest),
    ]


@settings(max_examples=150, deadline=None)
@given(dtype=st.sampled_from(DTYPES), count=st.integers(0, 700), seed=st.integers(0, 10**6))
def test_any_bits_come_back_from_their_own_code(dtype: torch.dtype, count: int, seed: int) -> None:
    values = any_bits(dtype, count, seed)
    coder, section = coding.encode(values)
    assert section.nbytes <= values.nbytes
    assert same_bits(coding.decode(section, coder, dtype, count), values)


@settings(max_examples=250, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES), count=st.integers(0, 700), seed=st.integers(0, 10**6),
    scale=st.sampled_from([None, 0.0, 1e-9, 1e-4, 1.0, 1e30]),
)  # fmt: skip
def test_any_bits_come_back_against_any_base(
    dtype: torch.dtype, count: int, seed: int, scale: float | None
) -> None:
    base, places = any_bits(dtype, count, seed), places_of(count, seed)
    values = any_bits(dtype, count, seed + 1) if scale is None else near(base, seed, scale)
    coder, section = coding.encode_against(values, base, places)
    assert section.nbytes <= values.nbytes
    assert same_bits(coding.decode_against(section, coder, base, places), values)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_whole_order_of_a_dtype_is_coded_without_loss(dtype: torch.dtype) -> None:
    """Both ends of the integer order, on both sides: every residual length that there is, as wide as the dtype."""
    width = 8 * dtype.itemsize
    numbers = sorted({
        sign * (1 << bit) + step for bit in range(width - 1) for sign in (1, -1) for step in (-1, 0, 1)
    })
    kind = {16: torch.int16, 32: torch.int32, 64: torch.int64}[width]
    values = torch.tensor([n for n in numbers if -(2 ** (width - 1)) <= n < 2 ** (width - 1)], dtype=kind)
    values = torch.cat([values, values.flip(0), values.roll(7)] * 9).view(dtype)
    base = torch.cat([values[5:], values[:5]])
    residuals = coding._residuals(coding._bits(values), coding._bits(base), dtype)
    assert np.array_equal(coding._restored(residuals, coding._bits(base), dtype), coding._bits(values))
    tokens, below = coding._tokens(residuals)
    head, missing = coding._untokened(tokens, residuals.dtype)
    assert np.array_equal(missing, below) and np.array_equal(head, (residuals >> below) << below)
    packed = torch.frombuffer(bytearray(coding._pack(residuals, below)), dtype=torch.uint8)
    reader = streams.Reader(packed, "x", "x")
    assert np.array_equal(coding._unpack(reader, head, missing), residuals)
    reader.end()


def test_neighbours_in_value_are_neighbours_in_order() -> None:
    values = torch.tensor([-torch.inf, -1.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, torch.inf])
    ordered = coding._ordered(coding._bits(values), values.dtype).view(np.int32)
    assert (np.diff(ordered) > 0).all() and ordered[3:5].tolist() == [-1, 0]
    up = torch.nextafter(values[1:7], torch.tensor(torch.inf))
    step = coding._ordered(coding._bits(up), values.dtype).view(np.int32) - ordered[1:7]
    assert step.tolist() == [1, 1, 2, 1, 1, 1]  # -0.0 and 0.0 are equal, so nextafter jumps over one of them
    assert np.array_equal(coding._ordered(ordered.view(np.uint32), values.dtype), coding._bits(values))


def test_several_blocks_are_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coding, "_BLOCK", 100)
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        base = any_bits(dtype, 1050, 1)
        base[30:] = near(base[30:].clamp(-1, 1), 3, 0.01)
        values, places = near(base, 2, 1e-4), places_of(1050, 5)
        for coder, section in (coding.encode(values), coding.encode_against(values, base, places)):
            against = coder == coding.RESIDUALS
            read = (
                coding.decode_against(section, coder, base, places)
                if against
                else coding.decode(section, coder, dtype, 1050)
            )
            assert same_bits(read, values)


@pytest.mark.parametrize(("dtype", "alone", "against"), [
    (torch.float32, 0.86, 0.62), (torch.bfloat16, 0.72, 0.30),
    (torch.float16, 0.90, 0.45), (torch.float64, 0.90, 0.80),
])  # fmt: skip
def test_what_training_moved_a_little_is_much_smaller_against_its_base(
    dtype: torch.dtype, alone: float, against: float
) -> None:
    draw = torch.Generator().manual_seed(0)
    base = (0.05 * torch.randn(20_000, generator=draw, dtype=torch.float64)).to(dtype)
    values = near(base, 1, 1e-4)
    place = [Place((20_000,), None, 20_000)]
    assert coding.encode(values)[1].nbytes < alone * values.nbytes
    assert coding.encode_against(values, base, place)[1].nbytes < against * values.nbytes


def test_a_change_of_rank_one_is_predicted() -> None:
    draw = torch.Generator().manual_seed(0)
    base = 0.05 * torch.randn(60 * 80, generator=draw)
    change = torch.outer(torch.randn(60, generator=draw), torch.randn(80, generator=draw)).reshape(-1)
    flags = torch.rand(60 * 80, generator=draw) < 0.5
    at = flags.nonzero().reshape(-1)
    before, values = base[at], (base + 0.01 * change + 1e-5 * torch.randn(4800, generator=draw))[at]
    place = [Place((60, 80), at, len(at))]
    factors, predicted = write_factors(values, before, place)
    assert len(factors) == 1 + 2 * (60 + 80)
    assert float((predicted - values).norm()) < 0.01 * float((before - values).norm())
    flat = [Place((len(at),), None, len(at))]  # the same values as a vector have no rows and columns
    assert coding.encode_against(values, before, place)[1].nbytes < 0.8 * (
        coding.encode_against(values, before, flat)[1].nbytes
    )


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(FLOATS),
    power=st.integers(-1000, 1000),
    noise=st.integers(-60, 0),
    seed=st.integers(0, 99),
)
def test_predictions_lose_nothing_at_any_scale(dtype: torch.dtype, power: int, noise: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    form, size = torch.finfo(dtype), 2.0**power
    base = (size * torch.randn(40 * 30, generator=draw, dtype=torch.float64)).clamp(form.min, form.max).to(dtype)
    change = torch.outer(*(torch.randn(n, generator=draw, dtype=torch.float64) for n in (40, 30))).reshape(-1)
    change += 2.0**noise * torch.randn(40 * 30, generator=draw, dtype=torch.float64)
    values = (base.double() + size * change).clamp(form.min, form.max).to(dtype)
    place = [Place((40, 30), None, 40 * 30)]
    coder, section = coding.encode_against(values, base, place)
    assert section.nbytes <= values.nbytes
    assert same_bits(coding.decode_against(section, coder, base, place), values)


@settings(max_examples=300, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]), seed=st.integers(0, 10**6),
    cut=st.floats(0, 1), flips=st.lists(st.integers(0, 10**6), min_size=1, max_size=4),
)  # fmt: skip
def test_damaged_code_is_refused_or_gives_that_many_values(
    dtype: torch.dtype, seed: int, cut: float, flips: list[int]
) -> None:
    base, places = any_bits(dtype, 300, 0), places_of(300, 1)
    values = base.clone() if dtype == torch.bool else near(base, 1, 1e-3)
    for coder, section in (coding.encode(values), coding.encode_against(values, base, places)):
        if coder == coding.RAW:
            continue
        code = section.numpy().copy()
        for flip in flips:
            code[flip // 8 % len(code)] ^= 1 << flip % 8
        for bad in (torch.from_numpy(code), section[: int(cut * len(section))], torch.cat([section, section[:1]])):
            try:
                read = (
                    coding.decode_against(bad, coder, base, places)
                    if coder == coding.RESIDUALS
                    else coding.decode(bad, coder, dtype, 300)
                )
            except ValueError:
                continue
            assert read.shape == (300,) and read.dtype == dtype and len(bad) == len(section)


def stream(kind: int, code: bytes) -> bytes:
    return bytes([kind]) + len(code).to_bytes(4, "little") + code


@pytest.mark.parametrize(("code", "count", "reason"), [
    (b"", 8, "ends after 0 bytes"),
    (b"\0" + b"\0" * 31, 8, "ends after"),
    (stream(1, b"\3\0"), 1 << 50, "claims to expand"),
    (stream(2, b"\0" * 9), 1 << 50, "claims to expand"),
    (stream(7, b"\0" * 9), 8, "kind 7"),
    (stream(1, b"\xff" * 9), 8, "does not expand"),
    (stream(2, b"\xff" * 9), 8, "does not expand"),
    (b"\1\xff\xff\xff\xff", 8, "ends after"),
    ((b"\0" + b"\0" * 8) * 4 + b"\0", 8, "after its end"),
])  # fmt: skip
def test_hostile_sections_are_refused_by_reason(code: bytes, count: int, reason: str) -> None:
    section = torch.frombuffer(bytearray(code), dtype=torch.uint8) if code else torch.empty(0, dtype=torch.uint8)
    with pytest.raises(ValueError, match=reason):
        coding.decode(section, coding.PLANES, torch.float32, count)


def test_other_forms_of_sections_are_refused() -> None:
    values = torch.zeros(4)
    for section, coder in (
        (values, coding.PLANES),
        (values, "golomb"),
        (values[:3], coding.RAW),
        (values.int(), "raw"),
    ):
        with pytest.raises(ValueError, match="expected"):
            coding.decode(section, coder, torch.float32, 4)
        with pytest.raises(ValueError, match="expected"):
            coding.decode_against(section, coder, values, [Place((4,), None, 4)])
    flagged = torch.tensor([0b10000000], dtype=torch.uint8)  # a vector cannot have factors
    with pytest.raises(ValueError, match="no matrix"):
        coding.decode_against(flagged, coding.RESIDUALS, values, [Place((4,), None, 4)])
    with pytest.raises(ValueError, match="more tensors"):
        coding.decode_against(flagged >> 1, coding.RESIDUALS, values, [Place((4,), None, 4)])


def test_streams_keep_within_what_a_reader_accepts() -> None:
    for size in (0, 1, 50, 1 << 16, 1 << 20):
        data = bytes(size)
        code = torch.frombuffer(bytearray(streams.squeeze(data)), dtype=torch.uint8)
        reader = streams.Reader(code, "x", "x")
        assert reader.stream(size).tobytes() == data
        reader.end()
        assert size <= 1024 * len(code) + (1 << 16) and len(code) <= max(size // 500, 20)
