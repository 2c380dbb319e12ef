"""Density to budget: exact, and refusals that say what would do."""

from fractions import Fraction
from math import floor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import MismatchError, ParamsError
from pipeline.masks.budget import budget, split_budget
from pipeline.parameters import ParameterIndex

INDEX = ParameterIndex({"body.weight": (10, 95), "head.weight": (4, 10), "head.bias": (10,)})  # 1,000; head 50


def test_the_written_decimal_counts() -> None:
    assert floor(0.29 * 100) == 28 and budget(0.29, 100) == 29
    assert budget(0.005, 22_713_986) == 113_569
    assert budget(1, 7) == budget(1.0, 7) == 7
    assert budget(0.1, 2**62) == 2**62 // 10  # no float on the way


@given(st.integers(1, 10**6), st.integers(1, 10**12))
def test_against_rational_arithmetic(millionths: int, total: int) -> None:
    k = millionths * total // 10**6
    if k:
        assert budget(millionths / 10**6, total) == k == floor(Fraction(millionths, 10**6) * total)


@pytest.mark.parametrize("density", [0, 0.0, -0.1, 1.0001, 2, float("nan"), float("inf"), True])
def test_a_density_out_of_range_is_refused(density: float) -> None:
    with pytest.raises(ParamsError, match="above 0 and at most 1"):
        budget(density, 100)


def test_a_density_that_chooses_nothing_is_refused() -> None:
    with pytest.raises(ParamsError, match=r"0\.0009 of 1000 parameters chooses none; the least is 0\.001$"):
        budget(0.0009, 1000)


def test_the_head_is_inside_the_budget() -> None:
    assert split_budget(INDEX, 0.1, ["head"]) == (["head.weight", "head.bias"], 50)
    assert split_budget(INDEX, 0.05, ["head"]) == (["head.weight", "head.bias"], 0)
    assert split_budget(INDEX, 0.1, []) == ([], 100)
    with pytest.raises(MismatchError, match="'hea'"):
        split_budget(INDEX, 0.1, ["hea"])


@given(st.integers(2, 10**9), st.data())
def test_the_density_named_in_the_refusal_suffices(total: int, data: st.DataObject) -> None:
    head = data.draw(st.integers(2, total))
    index = ParameterIndex({"head.w": (head,), "w": (total - head,)})
    density = data.draw(st.floats(1 / total, (head - 1) / total))
    try:
        split_budget(index, density, ["head"])
    except ParamsError as refusal:
        assert f"{head} parameters" in str(refusal) or "chooses none" in str(refusal)
        if "would hold it" in str(refusal):
            named = float(str(refusal).rpartition("density ")[2].split()[0])
            assert split_budget(index, named, ["head"])[1] >= 0
    else:
        assert budget(density, total) >= head
