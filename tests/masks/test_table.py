"""The table: any names come back, and no few bytes make many."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.masks.squeeze import expand, squeeze
from pipeline.masks.table import Stream, read_table, write_table
from pipeline.parameters import ParameterIndex
from pipeline.runtime.canonical import canonical_json

NAME = st.one_of(
    st.text(max_size=8), st.lists(st.sampled_from(["a", "b", "", "0", " ", "é"]), max_size=6).map(".".join)
)


@given(st.dictionaries(NAME, st.lists(st.integers(0, 99), max_size=4), max_size=8))
def test_any_names_and_shapes_come_back_in_order(shapes: dict[str, list[int]]) -> None:
    index = ParameterIndex(shapes)
    coders = {name: f"coder {i}" for i, name in enumerate(index)}
    streams = [Stream("coder 0", 3, 2**61), Stream("coder 1", 0, 0)]
    again, its, same = read_table(write_table(index, coders, streams))
    assert again == index and its == coders and same == streams


def test_a_name_is_written_as_what_is_new_in_it() -> None:
    names = ["encoder.0.weight", "encoder.0.bias", "encoder.10.bias", "encoder", "head.0"]
    index = ParameterIndex(dict.fromkeys(names, (1,)))
    text = expand(write_table(index, dict.fromkeys(names, "all"), []))
    assert b'"names":["0 encoder.0.weight","2 bias","1 10.bias","0 encoder","0 head.0"]' in text


def hostile(names: list[object]) -> bytes:
    table = {"names": names, "shapes": [[1]] * len(names), "coders": ["none"] * len(names), "streams": []}
    return squeeze(canonical_json(table).encode())


@pytest.mark.parametrize("name", ["", "a", "x a", " a", "9" * 5000 + " a"])
def test_a_name_without_a_count_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="invalid literal|digits"):
        read_table(hostile(["0 a", name]))


def test_names_that_would_share_without_end_are_refused() -> None:
    with pytest.raises(ValueError, match="too long"):
        read_table(hostile([f"0 {'a.' * 20_000}", *(f"{20_000} {i}" for i in range(500))]))


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b"\xff", b'{"names":1,"shapes":[],"coders":[],"streams":[]}', b"3"]
)
def test_what_is_no_table_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_table(squeeze(text))


def test_a_product_without_end_is_refused() -> None:
    table = {"names": ["0 w"], "shapes": [[2**61] * 2000], "coders": ["none"], "streams": []}
    with pytest.raises(ValueError, match="dimensions"):
        read_table(squeeze(canonical_json(table).encode()))
