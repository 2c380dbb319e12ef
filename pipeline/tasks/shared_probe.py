"""What a distributed run will cost, from a short probe on a throwaway model of each worker: an estimate."""

import math
import time
from dataclasses import dataclass

import torch

from pipeline.masks.select import dense
from pipeline.parameters import ParameterIndex
from pipeline.tasks.base import Task
from pipeline.tasks.clock import duration, timed, timed_forward, timed_steps
from pipeline.tasks.scoring import scores_for
from pipeline.tasks.sharing import EVALUATION, Sharing, batches_of
from pipeline.training.device import Device
from pipeline.training.masked import MaskedParameters
from pipeline.training.methods import mask_for, method_named
from pipeline.training.recipe import Recipe

_REPORTS = 4  # evaluations per epoch at most, as in pipeline.distributed.rounds


@dataclass(frozen=True)
class Estimate:
    """What one seed of a distributed cell is estimated to cost.

    Attributes:
        seconds: time.
        sent: bytes that all workers together hand over.
        nbytes: disk.
        probe: seconds that the probe took.
    """

    seconds: float
    sent: float
    nbytes: float
    probe: float

    def text(self, seeds: int) -> str:
        """Say what some seeds cost."""
        sent, kept = (f"{seeds * count / 1e6:,.1f} MB" for count in (self.sent, self.nbytes))
        time_ = duration(self.seconds * seeds)
        return f"about {time_}, {sent} sent, {kept} on disk (an estimate, from a probe of {self.probe:.1f} s)"


def estimate(
    task: Task, sharing: Sharing, recipe: Recipe, batch_size: int, device: Device, workers: int
) -> Estimate:
    """Time a few steps, a batch of scores and one of evaluation; every worker does it at once, as in the run.

    Bytes are counted: W workers send 2 (W - 1) times the changed values at each merge.

    Args:
        task: the data.
        sharing: how the workers share the work.
        recipe: how each trains.
        batch_size: examples per batch of one worker.
        device: where, and in which precision.
        workers: W.

    Returns:
        The estimate of a seed.
    """
    begun, where = time.monotonic(), device.device
    model = task.model(recipe.seed).to(where)
    index = ParameterIndex.of(model)
    steps = math.ceil(batches_of(sharing, batch_size, task.sizes["train"], workers) / recipe.accumulate)
    # As many coordinates as the run's, anywhere: scores take longer than all the rest of a probe.
    like = "random" if method_named(sharing.method).needs_ranking else sharing.method
    chosen = mask_for(like, model, density=sharing.density, head=sharing.head, seed=recipe.seed)
    with torch.random.fork_rng([where] if where.type == "cuda" else []):
        batches = task.batches("train", batch_size, seed=recipe.seed, epoch=0, device=where)
        masked_steps, merges, values = 0.0, 0, 0.0
        for mask, epochs in ((dense(index), sharing.warmup), (chosen, recipe.epochs - sharing.warmup)):
            if epochs:
                with MaskedParameters(model, mask) as masked:
                    masked_steps += epochs * steps * timed_steps(task, masked, batches, recipe, device)
                merges += (count := math.ceil(epochs * steps / (sharing.every or 1)))
                width = workers if sharing.own_masks and mask is chosen else 1
                values += count * mask.nnz * width * (2 if sharing.dtype == "bf16" else 4)
        held_out = task.batches(task.reported, EVALUATION * batch_size, device=where)
        reports = min(merges, _REPORTS * recipe.epochs)
        seconds = masked_steps + reports * len(held_out) * timed_forward(model, held_out[0], where)
        if method_named(sharing.method).needs_ranking:
            how = sharing.score | {"examples": sharing.score["batch_size"], "seed": recipe.seed}
            choices = 1 + (merges // sharing.renew if sharing.renew else 0)
            share = min(sharing.score["examples"], task.sizes["train"]) / sharing.score["batch_size"]
            once = timed(where, lambda: scores_for(sharing.method, task, model, head=sharing.head, **how))
            seconds += choices * share * once
    disk = 4.0 * chosen.nnz * (workers if sharing.own_masks else 1) * 1.1
    if sharing.warmup:
        disk = 4.0 * index.total
    return Estimate(seconds, 2 * (workers - 1) * values, disk, time.monotonic() - begun)
