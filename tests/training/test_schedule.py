"""Learning-rate schedules against transformers' own, and at their key steps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_linear_schedule_with_warmup

from pipeline.errors import ParamsError
from pipeline.training.schedule import SCHEDULES, make_schedule


@pytest.mark.parametrize(("total", "rising", "warmup"), [(40, 0, 0.0), (40, 4, 0.1), (37, 3, 0.06), (5, 5, 1.0)])
def test_linear_is_the_convention_of_transformers(total: int, rising: int, warmup: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_linear_schedule_with_warmup(optimizer, rising, total)
    ours = make_schedule("linear", total, warmup)
    for step in range(total):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        theirs.step()


def test_piecewise_rises_to_the_peak_and_falls_to_zero() -> None:
    factor = make_schedule("piecewise", 100, 0.2)
    assert [factor(s) for s in (0, 10, 20, 60, 100)] == [0.0, 0.5, 1.0, 0.5, 0.0]


def test_piecewise_peak_may_lie_between_steps() -> None:
    factor = make_schedule("piecewise", 5, 0.3)  # the peak is at 1.5
    assert factor(1) == pytest.approx(1 / 1.5)
    assert factor(2) == pytest.approx(3 / 3.5)


def test_constant_stays_at_the_peak_after_its_warmup() -> None:
    factor = make_schedule("constant", 10, 0.2)
    assert [factor(s) for s in range(10)] == [0.0, 0.5] + [1.0] * 8


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 300), st.floats(0, 1))
def test_every_factor_lies_between_zero_and_one(kind: str, total: int, warmup: float) -> None:
    factors = [make_schedule(kind, total, warmup)(step) for step in range(total)]
    assert all(0.0 <= factor <= 1.0 for factor in factors)
    top = factors.index(max(factors))
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)


def test_an_unknown_kind_and_a_bad_warmup_are_refused() -> None:
    with pytest.raises(ParamsError, match="cosine.*linear, piecewise, constant"):
        make_schedule("cosine", 10)
    with pytest.raises(ParamsError, match="warmup is 1.5"):
        make_schedule("linear", 10, 1.5)
