"""Masks that are learned by a training of their own: by how far dense training moves a weight, and by gates.

Both start from the base with the task's recipe at the rate of ``dense``, leave it as it was, and give a mask. What
is reported is then trained from the base through that mask, as for every other method.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from pipeline.losses import example_losses, to_device
from pipeline.masks.mask import Mask
from pipeline.masks.select import dense
from pipeline.parameters import ParameterIndex, unwrapped
from pipeline.runtime.progress import ProgressLine
from pipeline.tasks.base import Task
from pipeline.training.device import Device
from pipeline.training.loop import fit
from pipeline.training.masked import MaskedParameters
from pipeline.training.recipe import Recipe
from pipeline.training.schedule import make_schedule

_LOW, _HIGH = -1.5, 1.5  # the stretch of the gates
_OPEN = 5.0  # the gates' first value: all open
_GATE_LR = 0.1  # all three as in Guo et al.


def deviation(
    task: Task, model: nn.Module, recipe: Recipe, batch_size: int, device: Device, *,
    density: float, head: Sequence[str], split: str = "train",
) -> Mask:  # fmt: skip
    """Choose the head and the largest |theta - theta_0| after dense training.

    Args:
        task: the data.
        model: the base, on the device; left as it was.
        recipe: of the dense training.
        batch_size: examples per batch.
        device: where, and in which precision.
        density: chosen / all, head included.
        head: the head's module names.
        split: what to train on.

    Returns:
        The mask, of exactly k = floor(density * n) coordinates.
    """
    model = unwrapped(model)
    with _kept(model) as base, ProgressLine("deviation") as line:
        with MaskedParameters(model, dense(ParameterIndex.of(model))) as masked:
            fit(
                model,
                lambda epoch: task.batches(split, batch_size, seed=recipe.seed, epoch=epoch, device=device.device),
                masked=masked, recipe=recipe, device=device, progress=lambda p: line.update(p.step, p.steps),
            )  # fmt: skip
        moved = {name: (p.detach() - base[name]).abs_() for name, p in model.named_parameters() if name in base}
    return Mask.top_k(moved, density, head)


def diff_pruning(
    task: Task, model: nn.Module, recipe: Recipe, batch_size: int, device: Device, *,
    density: float, head: Sequence[str], penalty: float, split: str = "train",
) -> Mask:  # fmt: skip
    """Choose by L0-regularised gates.

    theta = theta_0 + z w with a gate per coordinate, z = clamp(s (r - l) + l, 0, 1), s = sigmoid(log u -
    log(1 - u) + a), u uniform, l = -1.5, r = 1.5. Trained are w (from 0) and a (from 5) on loss + penalty * sum
    sigmoid(a - log(-l / r)), the sum being the expected number of open gates. Then the head and the largest |z w|
    at u = 1/2 are chosen: the paper's magnitude pruning to an exact density, its gates the unstructured ones.
    Source: Guo, Rush, Kim 2021, "Parameter-Efficient Transfer Learning with Diff Pruning", arXiv 2012.07463.

    Args:
        task: the data.
        model: the base, on the device; left as it was.
        recipe: its epochs, rate of w, schedule, clipping and seed.
        batch_size: examples per batch.
        device: where, and in which precision.
        density: chosen / all, head included.
        head: the head's module names.
        penalty: the weight of an open gate; the paper's is 1.25e-7.
        split: what to train on.

    Returns:
        The mask, of exactly k = floor(density * n) coordinates.
    """
    model = unwrapped(model)
    with _kept(model) as base:
        change = _gated_training(task, model, base, recipe, batch_size, device, penalty, split)
    return Mask.top_k(change, density, head)


class _Gates:
    """w, a and the gates drawn for one step, of every trainable parameter of a model."""

    def __init__(self, model: nn.Module, base: dict[str, Tensor], seed: int) -> None:
        self.base = base
        self.parameters = {name: p for name, p in model.named_parameters() if name in base}
        self.w = {name: torch.zeros_like(p) for name, p in base.items()}
        self.a = {name: torch.full_like(p, _OPEN) for name, p in base.items()}
        self._drawn: dict[str, tuple[Tensor, Tensor]] = {}
        device = next(iter(base.values())).device
        self._generator = torch.Generator(device).manual_seed(seed)

    @torch.no_grad()
    def draw_(self) -> None:
        """Draw every gate and write theta_0 + z w into the model."""
        for name, parameter in self.parameters.items():
            u = torch.rand(parameter.shape, generator=self._generator, device=parameter.device)
            s = torch.sigmoid(torch.logit(u, eps=1e-6) + self.a[name])
            z = s * (_HIGH - _LOW) + _LOW
            slope = torch.where((z > 0) & (z < 1), s * (1 - s) * (_HIGH - _LOW), 0.0)
            self._drawn[name] = z.clamp_(0.0, 1.0), slope
            parameter.copy_(self.base[name] + z * self.w[name])

    @torch.no_grad()
    def collect_(self, penalty: float) -> None:
        """Turn the model's gradients into those of w and a, by the chain rule, the penalty's included."""
        for name, parameter in self.parameters.items():
            z, slope = self._drawn[name]
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            open_ = torch.sigmoid(self.a[name] - math.log(-_LOW / _HIGH))
            self.w[name].grad = gradient * z
            self.a[name].grad = gradient * self.w[name] * slope + penalty * open_ * (1 - open_)
            parameter.grad = None

    def change(self) -> dict[str, Tensor]:
        """|z w| with every gate at its middle, u = 1/2."""
        middle = {n: (torch.sigmoid(a) * (_HIGH - _LOW) + _LOW).clamp(0.0, 1.0) for n, a in self.a.items()}
        return {name: (w * middle[name]).abs() for name, w in self.w.items()}


def _gated_training(
    task: Task, model: nn.Module, base: dict[str, Tensor], recipe: Recipe, batch_size: int, device: Device,
    penalty: float, split: str,
) -> dict[str, Tensor]:  # fmt: skip
    """Train w and a; what remains is |z w|."""
    gates = _Gates(model, base, recipe.seed)
    torch.manual_seed(recipe.seed)
    w, a = list(gates.w.values()), list(gates.a.values())
    optimizer = torch.optim.Adam([{"params": w, "lr": recipe.lr}, {"params": a, "lr": _GATE_LR}])
    where, precision = device.device, device.autocast
    model.train()
    with ProgressLine("diff-pruning") as line:
        for epoch in range(recipe.epochs):
            batches = task.batches(split, batch_size, seed=recipe.seed, epoch=epoch, device=where)
            factor = make_schedule(recipe.schedule, recipe.epochs * len(batches), recipe.warmup)
            for number, batch in enumerate(batches):
                step = epoch * len(batches) + number
                for group, rate in zip(optimizer.param_groups, (recipe.lr, _GATE_LR), strict=True):
                    group["lr"] = rate * factor(step)
                gates.draw_()
                with torch.autocast(where.type, dtype=precision, enabled=precision is not None):
                    losses = example_losses(model, to_device(batch, where))
                torch.autograd.backward(losses.float().mean())
                gates.collect_(penalty)
                if recipe.clip is not None:
                    nn.utils.clip_grad_norm_(w, recipe.clip)
                optimizer.step()
                line.update(step + 1, recipe.epochs * len(batches))
    return gates.change()


def learned_mask(
    method: str, task: Task, model: nn.Module, recipe: Recipe, batch_size: int, device: Device, *,
    density: float, head: Sequence[str], epochs: int, penalty: float, split: str = "train",
) -> Mask:  # fmt: skip
    """Learn the mask of a method by its name; ``epochs`` replaces the recipe's where it is not 0.

    Returns:
        The mask, with the method in its provenance.
    """
    recipe = replace(recipe, epochs=epochs or recipe.epochs, accumulate=1)
    if method == "deviation":
        mask = deviation(task, model, recipe, batch_size, device, density=density, head=head, split=split)
    else:
        mask = diff_pruning(
            task, model, recipe, batch_size, device, density=density, head=head, penalty=penalty, split=split
        )
    mask.info |= {"method": method, "density": mask.density, "lr": recipe.lr, "epochs": recipe.epochs}
    return mask


@contextmanager
def _kept(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Keep a model's trainable parameters aside and put them back; buffers and random numbers too.

    Yields:
        name -> the parameter's value before.
    """
    base = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    with torch.random.fork_rng():
        try:
            yield base
        finally:
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if name in base:
                        p.copy_(base[name])
                for name, b in model.named_buffers():
                    b.copy_(buffers[name])
            model.eval()
