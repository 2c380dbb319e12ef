"""How long work takes on a device, from a few repetitions: what estimates are made of."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from pipeline.losses import Batch, outputs_of
from pipeline.tasks.base import Task
from pipeline.training.device import Device
from pipeline.training.loop import fit
from pipeline.training.masked import MaskedParameters
from pipeline.training.recipe import Recipe

_STEPS = 3  # timed after one that warms up
_LONG = 0.5  # seconds


class Clock:
    """Moments at which the device had done all it was given."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._marks = device, list[float]()

    def mark(self) -> None:
        """Wait for the device, and remember the moment."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._marks.append(time.monotonic())

    @property
    def shortest(self) -> float:
        """Seconds between two marks."""
        return min(b - a for a, b in zip(self._marks, self._marks[1:], strict=False)) if self._marks[1:] else 0.0


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds that some work takes the second time, or the first where that is long beside what it sets up."""
    clock = Clock(device)
    clock.mark()
    work()
    clock.mark()
    if clock.shortest < _LONG:
        work()
        clock.mark()
    return clock.shortest


def timed_forward(model: nn.Module, batch: Batch, device: torch.device) -> float:
    """Seconds that one batch takes through a model, without gradients."""
    with torch.no_grad():
        return timed(device, lambda: outputs_of(model, batch))


def timed_steps(
    task: Task, masked: MaskedParameters, batches: Sequence[Batch], recipe: Recipe, device: Device
) -> float:
    """Seconds of a training step; the model is trained a little by it.

    Args:
        task: says how batches lie in memory.
        masked: the masked model, a throwaway one.
        batches: of one epoch.
        recipe: how it is trained; a thousandth of its rate is used.
        device: where, and in which precision.

    Returns:
        The shortest of a few.
    """
    where = device.device
    steps = Clock(where)
    fit(
        masked.model, lambda _: batches[: (1 + _STEPS) * recipe.accumulate], masked=masked,
        recipe=replace(recipe, epochs=1, schedule="constant", warmup=1.0, lr=recipe.lr * 1e-3),
        device=device, channels_last=task.kind == "image" and where.type == "cuda",
        progress=lambda _: steps.mark(),
    )  # fmt: skip
    return steps.shortest


def duration(seconds: float) -> str:
    """``45 s`` or ``12 min``."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
