"""Masks learned by a training: the farthest moved, and the gates' gradient by the chain rule."""

import math

import pytest
import torch

from pipeline.errors import ParamsError
from pipeline.losses import example_losses
from pipeline.masks.mask import Mask
from pipeline.masks.select import dense
from pipeline.parameters import ParameterIndex
from pipeline.tasks.choosing import Learning, choose
from pipeline.tasks.learning import _Gates, deviation, diff_pruning
from pipeline.training.device import choose_device
from pipeline.training.loop import fit
from pipeline.training.masked import MaskedParameters
from pipeline.training.recipe import Recipe

HEAD = ["classifier"]
CPU = choose_device("cpu", "fp32")


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_deviation_is_the_top_of_what_dense_training_moved(make, folder):
    task, recipe = make(folder), Recipe(epochs=2, lr=1e-3, seed=4)
    model = task.model(4)
    before = values(model)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    mask = deviation(task, model, recipe, 16, CPU, density=0.1, head=HEAD)
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with MaskedParameters(model, dense(ParameterIndex.of(model))) as masked:
        fit(model, lambda e: task.batches("train", 16, seed=4, epoch=e), masked=masked, recipe=recipe)
    moved = {name: (p.detach() - before[name]).abs() for name, p in model.named_parameters()}
    assert mask == Mask.top_k(moved, 0.1, HEAD)


def test_the_gates_gradient_is_that_of_autograd(make, folder):
    task, penalty = make(folder), 1e-3
    model = task.model(0).double()
    base = values(model)
    gates = _Gates(model, base, seed=9)
    g = torch.Generator().manual_seed(1)
    for name in base:  # a state in which gates are open, shut and in between
        gates.w[name] = torch.randn(base[name].shape, generator=g, dtype=torch.float64) * 1e-2
        gates.a[name] = torch.randn(base[name].shape, generator=g, dtype=torch.float64) * 2
    batch = task.batches("train", 8, seed=0)[0]
    gates.draw_()
    example_losses(model, batch).mean().backward()
    gates.collect_(penalty)
    w = {name: x.clone().requires_grad_() for name, x in gates.w.items()}
    a = {name: x.clone().requires_grad_() for name, x in gates.a.items()}
    generator = torch.Generator().manual_seed(9)
    theta, regular = {}, torch.zeros((), dtype=torch.float64)
    for name in base:
        u = torch.rand(base[name].shape, generator=generator)
        s = torch.sigmoid(torch.log(u / (1 - u)) + a[name])
        theta[name] = base[name] + (s * 3 - 1.5).clamp(0, 1) * w[name]
        regular = regular + torch.sigmoid(a[name] - math.log(1.5 / 1.5)).sum()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = torch.func.functional_call(model, theta, kwargs=inputs).logits
    (torch.nn.functional.cross_entropy(logits, batch["labels"]) + penalty * regular).backward()
    for name in base:
        for ours, theirs in ((gates.w[name].grad, w[name].grad), (gates.a[name].grad, a[name].grad)):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_a_penalty_closes_gates(make, folder):
    task, recipe = make(folder), Recipe(epochs=2, lr=1e-3)
    model = task.model(0)
    before = values(model)
    mask = diff_pruning(task, model, recipe, 16, CPU, density=0.1, head=HEAD, penalty=1e-6)
    assert mask.nnz == int(0.1 * mask.index.total) and mask.whole("classifier.weight")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    again = diff_pruning(task, model, recipe, 16, CPU, density=0.1, head=HEAD, penalty=1e-6)
    assert again == mask
    gates = {penalty: _Gates(model, before, 0) for penalty in (0.0, 1.0)}
    for penalty, gate in gates.items():
        gate.draw_()
        gate.collect_(penalty)
    name = "bert.pooler.dense.weight"
    assert gates[0.0].a[name].grad.abs().max() == 0  # no loss was backpropagated, and no penalty
    assert bool((gates[1.0].a[name].grad > 0).all())  # descent closes them


def test_methods_by_name(make, folder):
    task = make(folder)
    how = Learning(Recipe(epochs=1, lr=1e-3, seed=0), 16, CPU, epochs=2)
    for name in ("deviation", "diff-pruning", "shira", "lora", "random"):
        base = task.model(0)
        model, mask = choose(name, task, base, density=0.3, head=HEAD, seed=0, learning=how)
        assert (model is base) == (name != "lora") and mask.info["method"] == name
        assert 0.1 < mask.info["density"] <= 0.3
    assert choose("deviation", task, base, density=0.3, head=HEAD, seed=0, learning=how)[1].info["epochs"] == 2
    with pytest.raises(ParamsError, match="'deviation' learns its mask by a training"):
        choose("deviation", task, base, density=0.3, head=HEAD, seed=0)
