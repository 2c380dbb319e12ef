"""Deltas, variants and chains of models on a GPU: the same bits there, on the CPU, and back."""

import copy

import pytest
import torch

from pipeline.deltas.chain import Chain
from pipeline.deltas.delta import Delta
from pipeline.deltas.target import same_bits
from pipeline.deltas.variants import Variants
from pipeline.losses import example_losses
from pipeline.parameters import base_digest
from pipeline.training.masked import MaskedParameters
from tests.training.test_masked import CASES, on, random_mask

pytestmark = pytest.mark.usefixtures("repeatable")


def head_of(case):
    return "classifier" if case == "bert" else "fc"


def train(model, case, mask, steps=3):
    """Move the masked values, and BatchNorm's statistics with its integer counter."""
    dtype = next(model.parameters()).dtype
    with MaskedParameters(model, mask) as masked:
        optimizer = torch.optim.AdamW([masked.values], lr=0.02)
        for step in range(steps):
            batch = on(masked.values.device, CASES[case][1](step), dtype)
            example_losses(model, batch).mean().backward()
            optimizer.step()
            masked.write_()
            optimizer.zero_grad()


@pytest.fixture(params=[(case, dtype) for case in CASES for dtype in (torch.float32, torch.bfloat16)], ids=str)
def made(request, cuda):
    """A base, and two models trained from it under masks of their own, all on the GPU."""
    case, dtype = request.param
    torch.manual_seed(0)
    base = CASES[case][0]().to(cuda, dtype)
    masks = [random_mask(base, 0.2, seed=seed, whole=(head_of(case),)) for seed in (1, 2)]
    models = [copy.deepcopy(base) for _ in masks]
    for model, mask in zip(models, masks, strict=True):
        train(model, case, mask)
    return case, base, masks, models


def assert_same(model, other):
    for (name, one), two in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert same_bits(one, two), name


def test_a_delta_taken_there_turns_both_kinds_of_base_into_the_model_and_back(made, tmp_path, cuda):
    _, base, masks, models = made
    assert base_digest(base) == base_digest(copy.deepcopy(base).cpu())
    Delta.of(models[0], masks[0], base=base, keep_base=True).save(tmp_path / "delta.safetensors")
    delta = Delta.load(tmp_path / "delta.safetensors")
    assert delta == Delta.of(copy.deepcopy(models[0]).cpu(), masks[0], base=copy.deepcopy(base).cpu())
    for place in ("cuda", "cpu"):
        model = copy.deepcopy(base).to(place)
        delta.apply_(model)
        assert next(model.parameters()).device.type == place
        assert_same(model, models[0])
        delta.revert_(model)
        assert_same(model, base)


def test_variants_switch_bit_for_bit_and_hold_no_more_memory(made, tmp_path, cuda):
    _, base, masks, models = made
    deltas = {}
    for name, mask, model in zip("ab", masks, models, strict=True):
        path = tmp_path / f"{name}.safetensors"
        Delta.of(model, mask, base=base).save(path, base=base)  # thin: coded against the base
        deltas[name] = Delta.load(path)
    served = Variants(copy.deepcopy(base), deltas)
    ends = {"a": models[0], "b": models[1], None: base}
    held = []
    for turn in range(54):
        name = ("a", "b", None)[turn % 3]
        served.use(name)
        if turn < 6 or turn > 50:
            assert_same(served.model, ends[name])
        held.append(torch.cuda.memory_allocated())
    assert set(held[3:]) == {held[3]}


def test_swaps_between_two_deltas_are_exact(made, cuda):
    _, base, masks, models = made
    a, b = (Delta.of(m, mask, base=base, keep_base=True) for m, mask in zip(models, masks, strict=True))
    model = copy.deepcopy(models[0])
    for _ in range(10):
        Delta.swap_(model, a, b)
        assert_same(model, models[1])
        Delta.swap_(model, b, a)
        assert_same(model, models[0])


@pytest.mark.parametrize("keep_base", [True, False])
def test_a_chain_of_a_model_there_restores_on_both(made, keep_base, tmp_path, cuda):
    case, base, masks, _ = made
    model = copy.deepcopy(base)
    chain = Chain.create(tmp_path / "chain", model, keep_base=keep_base)
    states = [copy.deepcopy(model)]
    for mask in masks:
        train(model, case, mask)
        chain.append(model, mask)
        states.append(copy.deepcopy(model))
    chain = Chain.open(tmp_path / "chain", base=None if keep_base else base)
    chain.verify()
    for place in ("cuda", "cpu"):
        target = copy.deepcopy(base).to(place)
        for step in (2, 0, 1, 2):
            chain.restore_(target, step)
            assert_same(target, states[step])
