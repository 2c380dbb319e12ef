"""Epochs that fit a time: a few steps of each method are timed, and an evaluation."""

import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.tasks.fitting import EVALUATION
from pipeline.training.loop import fit
from pipeline.training.masked import MaskedParameters

if TYPE_CHECKING:
    from pipeline.tuning.run import Trainer

STEPS = 3  # timed after one that warms up
MOST = 30
"""Epochs that a budget gives at most: beyond them a small data set is only learnt by heart."""
_SPARE = 0.9  # of the time; the rest is for loading, writing and a machine that slows down


@dataclass(frozen=True)
class Fitting:
    """What a budget leaves.

    Attributes:
        epochs: passes over train, 1 at least.
        said: a sentence on how it came about.
    """

    epochs: int
    said: str


def fit_epochs(trainer: "Trainer", seconds: float) -> Fitting:
    """Count the epochs that all methods together can make in a time.

    Each method's step is timed on real batches of a throwaway model, and one evaluation batch; an epoch costs its
    steps and one evaluation of the validation rows.

    Args:
        trainer: with its rates found.
        seconds: what is left of the budget.

    Returns:
        The epochs; one, with a warning, where not even one fits.
    """
    begun = time.monotonic()
    each = sum(_epoch(trainer, method) for method in trainer.plan.methods)
    left = _SPARE * seconds - (time.monotonic() - begun)
    epochs = min(MOST, math.floor(left / each)) if each else MOST
    cost = f"an epoch of {' + '.join(trainer.plan.methods)} takes about {each:.1f} s"
    if epochs < 1:
        warning = f"warning: {cost}, more than the {max(left, 0):.0f} s left of the budget; training one epoch"
        return Fitting(1, warning)
    return Fitting(epochs, f"{cost}: {epochs} of them fit the budget")


def _epoch(trainer: "Trainer", method: str) -> float:
    """Seconds that an epoch of a method and its evaluation are estimated to take."""
    task, where, batch = trainer.task_of(method), trainer.device.device, trainer.plan.task.train.batch_size
    model = task.model(trainer.seed).to(where)
    mask = trainer.chosen(method, model)
    marks: list[float] = []
    sequence = task.batches("train", batch, seed=trainer.seed, device=where)
    with MaskedParameters(model, mask) as masked:
        fit(
            model, lambda _: sequence[: STEPS + 1], masked=masked, device=trainer.device,
            recipe=replace(trainer.recipe(method), epochs=1), progress=lambda _: marks.append(time.monotonic()),
        )  # fmt: skip
    step = min(b - a for a, b in zip(marks, marks[1:], strict=False)) if marks[1:] else 0.0
    rows, judged = len(task.rows("train")), len(task.rows(task.reported))
    sample = min(rows, EVALUATION * batch)
    task.name_part("timed", task.rows("train")[:sample])
    started = time.monotonic()
    task.evaluate(model, "timed", EVALUATION * batch, where, trainer.device.autocast)
    return math.ceil(rows / batch) * step + judged / sample * (time.monotonic() - started)
