"""Variants: one base in memory, many deltas; bit-exact over many switches, all or nothing."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.deltas import target as writing
from pipeline.deltas.delta import Delta
from pipeline.deltas.target import same_bits
from pipeline.deltas.variants import Variants
from pipeline.errors import MismatchError, ParamsError
from pipeline.masks.mask import Mask
from pipeline.parameters import ParameterIndex

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


pytestmark = pytest.mark.usefixtures("one_thread")


def net(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 12, bias=False), nn.Linear(12, 3)).to(
        dtype
    )


@torch.no_grad()
def variant(base: nn.Module, seed: int, whole: tuple[str, ...]) -> tuple[nn.Module, Mask]:
    draw = torch.Generator().manual_seed(seed)
    index = ParameterIndex.of(base)
    flags = {name: torch.rand(shape, generator=draw) < 0.3 for name, shape in index.shapes.items()}
    for name in index.within(whole):
        flags[name][:] = True
    mask, model = Mask.from_bool(flags), copy.deepcopy(base)
    for name, parameter in model.named_parameters():
        at = mask.indices[name]
        parameter.view(-1)[at] += (1e-3 * torch.randn(len(at), generator=draw)).to(parameter.dtype)
        parameter.view(-1)[at[:2]] = torch.tensor([torch.nan, -0.0])[: len(at)].to(parameter.dtype)
    model[1].running_var *= 1 + seed
    model[1].num_batches_tracked += seed
    return model, mask


WHOLE = {"a": ("3",), "b": (), "c": ("3", "2"), "d": ("0", "1", "2", "3")}


def family(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, nn.Module], dict[str, Delta]]:
    base = net(dtype)
    made = {name: variant(base, seed, whole) for seed, (name, whole) in enumerate(WHOLE.items(), 1)}
    deltas = {name: Delta.of(model, mask, base=base) for name, (model, mask) in made.items()}
    return base, {name: model for name, (model, _) in made.items()}, deltas


def holds(model: nn.Module, wanted: nn.Module) -> bool:
    state = wanted.state_dict()
    return all(same_bits(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("thin", [False, True])
def test_a_thousand_switches_drift_by_nothing(tmp_path: Path, thin: bool, dtype: torch.dtype) -> None:
    base, models, deltas = family(dtype)
    if thin:
        for name, delta in deltas.items():
            delta.save(tmp_path / name, base=base)
        deltas = {name: Delta.load(tmp_path / name) for name in deltas}
    variants = Variants(copy.deepcopy(base), deltas)
    draw = torch.Generator().manual_seed(0)
    names = [*deltas, None]
    for step in range(1000):
        name = names[int(torch.randint(len(names), (), generator=draw))]
        assert variants.use(name) is variants.model and variants.active == name
        if step % 37 == 0:
            assert holds(variants.model, models[name] if name else base)
    variants.use(None)
    assert holds(variants.model, base)


def test_every_switch_is_exact() -> None:
    base, models, deltas = family()
    variants = Variants(copy.deepcopy(base), deltas)
    for old in [*deltas, None]:
        for new in [*deltas, None]:
            variants.use(old)
            assert holds(variants.use(new), models[new] if new else base)


class Interrupted(BaseException):
    """Not an Exception, as Ctrl-C is none."""


@pytest.mark.parametrize("nth", range(8))
def test_a_switch_that_fails_leaves_the_model_as_it_was(nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base, models, deltas = family()
    variants = Variants(copy.deepcopy(base), deltas)
    variants.use("a")
    calls, put_ = 0, writing.put_

    def failing(tensor: torch.Tensor, at: torch.Tensor | None, values: torch.Tensor) -> None:
        nonlocal calls
        put_(tensor, at, values)
        calls += 1
        if calls == nth + 1:
            raise Interrupted

    monkeypatch.setattr(writing, "put_", failing)
    with pytest.raises(Interrupted):
        variants.use("c")
    monkeypatch.undo()
    assert variants.active == "a" and holds(variants.model, models["a"])
    assert holds(variants.use("c"), models["c"]) and holds(variants.use(None), base)


def test_strangers_are_refused_by_name() -> None:
    base, _, deltas = family()
    stranger = net(seed=9)
    model, mask = variant(stranger, 1, ("3",))
    other = Delta.of(model, mask, base=stranger)
    with pytest.raises(MismatchError, match="delta 'b': the model is not the delta's base"):
        Variants(copy.deepcopy(base), {"a": deltas["a"], "b": other})
    with pytest.raises(MismatchError, match="delta 'a': tensor '0.weight' is bfloat16"):
        Variants(net(torch.bfloat16), deltas)
    with pytest.raises(ParamsError, match="no variant 'e'; there are: a, b, c, d"):
        Variants(copy.deepcopy(base), deltas).use("e")


def test_a_model_that_was_changed_in_between_is_refused_as_it_is() -> None:
    base, models, deltas = family()
    variants = Variants(copy.deepcopy(base), deltas)
    variants.use("a")
    with torch.no_grad():
        variants.model[3].bias[2] += 1
    changed = copy.deepcopy(variants.model)
    for name in ("b", None):
        with pytest.raises(MismatchError, match="tensor '3.bias' does not hold"):
            variants.use(name)
        assert variants.active == "a" and holds(variants.model, changed)


def test_a_state_dict_has_variants_too_but_not_without_a_delta() -> None:
    base, models, deltas = family()
    state = copy.deepcopy(base.state_dict())
    variants = Variants(state, deltas)
    for name in ("d", "a", None, "b"):
        assert variants.use(name) is state
        wanted = (models[name] if name else base).state_dict()
        assert all(same_bits(tensor, wanted[key]) for key, tensor in state.items())
    with pytest.raises(ParamsError, match="no variants without a delta"):
        Variants(state, {})
