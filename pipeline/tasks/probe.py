"""What a run of checkpoints will cost, from a short probe on a throwaway model: an estimate, and called one."""

import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.deltas.chain import Chain
from pipeline.errors import StorageError
from pipeline.losses import Batch, outputs_of
from pipeline.masks.mask import Mask
from pipeline.tasks.checkpointing import Masks
from pipeline.tasks.fitting import EVALUATION
from pipeline.training.leak import LeakyParameters
from pipeline.training.loop import fit
from pipeline.training.masked import MaskedParameters
from pipeline.training.methods import method_named
from pipeline.training.recipe import Recipe

_STEPS = 3  # timed after one that warms up


@dataclass(frozen=True)
class Estimate:
    """What one seed of a cell is estimated to cost.

    Attributes:
        seconds: time.
        nbytes: disk, of the chain with its base.
        probe: seconds that the probe took.
    """

    seconds: float
    nbytes: float
    probe: float

    def text(self, seeds: int) -> str:
        """Say what some seeds cost."""
        seconds, megabytes = self.seconds * seeds, self.nbytes * seeds / 1e6
        minutes = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
        return f"about {minutes} and {megabytes:,.1f} MB (an estimate, from a probe of {self.probe:.1f} s)"

    def check_room(self, folder: Path, seeds: int) -> None:
        """Refuse to begin where the disk is too small: a finished chain is copied before its source goes.

        Args:
            folder: on the disk in question.
            seeds: how many are to run.

        Raises:
            StorageError: if there is not room for twice the chains.
        """
        free = shutil.disk_usage(folder).free
        if free < 2 * seeds * self.nbytes:
            raise StorageError(
                f"{folder}: {free / 1e6:,.0f} MB free; this cell is estimated to need "
                f"{2 * seeds * self.nbytes / 1e6:,.0f} MB while it works; free some space, or run fewer seeds"
            )


def estimate(
    masks: Masks, mask: Mask, recipe: Recipe, batch_size: int, every: int | None, judged: str, *, leak: bool
) -> Estimate:
    """Time a few steps, a batch of scores, a batch of evaluation, and one checkpoint in a temporary folder.

    Args:
        masks: how masks are chosen.
        mask: the first.
        recipe: how the model is trained.
        batch_size: examples per batch.
        every: epochs between two masks; None for one mask.
        judged: the split that checkpoints are scored on.
        leak: as in ``fit_task``.

    Returns:
        The estimate of a seed, scores of the first mask not counted.
    """
    begun, task, where = time.monotonic(), masks.task, masks.device.device
    model = task.model(masks.seed).to(where)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng([where] if where.type == "cuda" else []):
        chain = Chain.create(Path(folder) / "chain", model)
        steps = _Clock(where)
        sequence = task.batches("train", batch_size, seed=recipe.seed, epoch=0, device=where)
        kind = LeakyParameters if leak else MaskedParameters
        with kind(model, mask) as masked:
            fit(
                model, lambda _: sequence[: (1 + _STEPS) * recipe.accumulate], masked=masked,
                recipe=replace(recipe, epochs=1, schedule="constant", warmup=1.0, lr=recipe.lr * 1e-3),
                device=masks.device, channels_last=task.kind == "image" and where.type == "cuda",
                progress=lambda _: steps.mark(),
            )  # fmt: skip
            touched = masked.mask
        checkpoint = _Clock(where)
        checkpoint.mark()
        step = chain.append(model, touched)
        chain.restore_(model)
        checkpoint.mark()
        base = chain.nbytes - sum(step.nbytes.values())
    sizes = {name: parameter.element_size() for name, parameter in model.named_parameters()}
    # Values are coded against the base's, which a few steps hardly leave: count them as they are.
    values = sum(touched.count(name) * sizes[name] for name in touched.index)
    each = step.nbytes["coordinates"] + values + step.nbytes["buffers"] + step.nbytes["header"]
    epochs = recipe.epochs
    changes = 0 if every is None else (epochs - 1) // every
    evaluations = task.batches(judged, EVALUATION * batch_size, device=where)
    seconds = epochs * math.ceil(len(sequence) / recipe.accumulate) * steps.shortest
    seconds += 2 * epochs * len(evaluations) * _timed(where, lambda: _forward(model, evaluations[0]))
    seconds += epochs * checkpoint.shortest
    if changes and method_named(masks.method).needs_ranking:
        few = replace(masks, score=masks.score.model_copy(update={"examples": [masks.score.batch_size]}))
        batches = min(masks.score.examples[-1], task.sizes["train"]) / masks.score.batch_size
        seconds += changes * batches * _timed(where, lambda: few.choose(model, 0))
    nbytes = base + epochs * each - (epochs - 1 - changes) * step.nbytes["coordinates"]
    return Estimate(seconds, nbytes, time.monotonic() - begun)


class _Clock:
    """Moments at which the device had done all it was given."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._marks = device, list[float]()

    def mark(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._marks.append(time.monotonic())

    @property
    def shortest(self) -> float:
        """Seconds between two marks."""
        return min(b - a for a, b in zip(self._marks, self._marks[1:], strict=False)) if self._marks[1:] else 0.0


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds that some work takes the second time."""
    clock = _Clock(device)
    for _ in range(2):
        clock.mark()
        work()
    clock.mark()
    return clock.shortest


@torch.no_grad()
def _forward(model: nn.Module, batch: Batch) -> Tensor:
    return outputs_of(model, batch)
