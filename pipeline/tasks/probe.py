"""What a run of checkpoints will cost, from a short probe on a throwaway model: an estimate, and called one."""

import math
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipeline.deltas.chain import Chain
from pipeline.errors import StorageError
from pipeline.masks.mask import Mask
from pipeline.tasks.checkpointing import Masks
from pipeline.tasks.clock import Clock, duration, timed, timed_forward, timed_steps
from pipeline.tasks.fitting import EVALUATION
from pipeline.training.leak import LeakyParameters
from pipeline.training.masked import MaskedParameters
from pipeline.training.methods import method_named
from pipeline.training.recipe import Recipe


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
        return (
            f"about {duration(seconds)} and {megabytes:,.1f} MB (an estimate, from a probe of {self.probe:.1f} s)"
        )

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
        sequence = task.batches("train", batch_size, seed=recipe.seed, epoch=0, device=where)
        kind = LeakyParameters if leak else MaskedParameters
        with kind(model, mask) as masked:
            step_seconds = timed_steps(task, masked, sequence, recipe, masks.device)
            touched = masked.mask
        checkpoint = Clock(where)
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
    seconds = epochs * math.ceil(len(sequence) / recipe.accumulate) * step_seconds
    seconds += 2 * epochs * len(evaluations) * timed_forward(model, evaluations[0], where)
    seconds += epochs * checkpoint.shortest
    if changes and method_named(masks.method).needs_ranking:
        few = replace(masks, score=masks.score.model_copy(update={"examples": [masks.score.batch_size]}))
        batches = min(masks.score.examples[-1], task.sizes["train"]) / masks.score.batch_size
        seconds += changes * batches * timed(where, lambda: few.choose(model, 0))
    nbytes = base + epochs * each - (epochs - 1 - changes) * step.nbytes["coordinates"]
    return Estimate(seconds, nbytes, time.monotonic() - begun)
