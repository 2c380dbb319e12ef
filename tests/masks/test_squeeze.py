"""Integers and bytes under LZMA: exact, and no bomb goes off."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.masks.squeeze import bound, expand, pack_integers, squeeze, unpack_integers


@given(st.lists(st.integers(0, 2**63 - 1)))
def test_integers(values: list[int]) -> None:
    assert unpack_integers(pack_integers(np.array(values, dtype=np.int64))).tolist() == values


@pytest.mark.parametrize("data", [b"\x80", b"\1\xff", b"\x80" * 9 + b"\1"])
def test_hostile_integers_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="cut off|too long"):
        unpack_integers(data)


@given(st.binary(max_size=300), st.integers(1, 50))
def test_bytes(data: bytes, times: int) -> None:
    assert expand(squeeze(data * times)) == data * times


@given(st.binary(max_size=300), st.binary(min_size=1, max_size=20))
def test_what_does_not_end_where_it_should_is_refused(data: bytes, more: bytes) -> None:
    code = squeeze(data)
    for wrong in (code + more, code[:-1], b""):
        with pytest.raises(ValueError, match="expand|cut off|ends before"):
            expand(wrong)


def test_a_bomb_does_not_expand() -> None:
    bomb = squeeze(bytes(10**7))
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than the .* allowed"):
        expand(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * bound(bomb) + 2**21  # LZMA's own window is 2^20 bytes
