"""One worker of a distributed run on one task: its shard, its masks, its training."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pipeline.distributed.collectives import Collectives
from pipeline.distributed.joint_resume import JointResume
from pipeline.distributed.own_masks import interleaved, random_scores
from pipeline.distributed.rounds import Course, OnMerge, Rounds
from pipeline.errors import DivergedError, ParamsError
from pipeline.masks.mask import Mask
from pipeline.masks.select import STRATEGIES, dense
from pipeline.parameters import ParameterIndex
from pipeline.runtime.progress import ProgressLine
from pipeline.tasks.base import Task
from pipeline.tasks.batches import Batches
from pipeline.tasks.draws import Rows, permutation
from pipeline.tasks.scoring import scores_for
from pipeline.training.device import Device
from pipeline.training.loop import FitResult, fit
from pipeline.training.masked import MaskedParameters
from pipeline.training.methods import METHODS, mask_for, method_named
from pipeline.training.recipe import Recipe

EVALUATION = 4  # evaluation batches are this many times larger: no gradients, hence no memory for them
_SHARDS = 5  # the key of this draw, beside those of ``Task``


@dataclass(frozen=True)
class Sharing:
    """What the workers of a run have in common, beside the recipe.

    Attributes:
        method: of ``pipeline.training.methods``.
        density: updated / all parameters of one worker's mask.
        head: module names.
        score: ``examples``, and ``how`` of ``pipeline.schema.ScoreParams``.
        every, average, renew, own_masks, outer, dtype: see ``pipeline.distributed.rounds.Course``.
        warmup: epochs that train everything before the masks are chosen.
        shard: each worker has a part of the training data; else all of it, in an order of its own.
    """

    method: str
    density: float
    head: tuple[str, ...]
    score: dict[str, Any]
    every: int
    average: str = "mean"
    renew: int = 0
    own_masks: bool = False
    outer: tuple[float, float] | None = None
    dtype: str = "fp32"
    warmup: int = 0
    shard: bool = True


def course_of(
    sharing: Sharing, recipe: Recipe, batch_size: int, rows: int, workers: int, *, debug: bool = False
) -> Course:
    """Lay out a run, the same for every worker; what does not fit together is found here, before it starts.

    Args:
        sharing: how the workers share the work.
        recipe: how each trains.
        batch_size: examples per batch of one worker.
        rows: of the training data.
        workers: W.
        debug: check after each merge that all ranks are bitwise equal.

    Returns:
        When they merge, and how many steps they make, each as often as the others.

    Raises:
        ParamsError: if the settings do not fit each other, or the data.
    """
    if not 0 <= sharing.warmup < recipe.epochs:
        raise ParamsError(f"warmup is {sharing.warmup} epochs; expected fewer than the {recipe.epochs} of the run")
    method = method_named(sharing.method)
    if method.strategy not in STRATEGIES:
        known = ", ".join(name for name, other in METHODS.items() if other.strategy in STRATEGIES)
        raise ParamsError(f"method '{method.name}' takes more than a mask of the base; expected one of {known}")
    if sharing.own_masks and not (method.needs_ranking or method.strategy == "random"):
        raise ParamsError(f"method '{method.name}' has one mask for all workers; set own_masks to false")
    if sharing.shard and rows < workers:
        raise ParamsError(
            f"workers is {workers}, but train has {rows} rows; start {rows} at most, or set shard to false"
        )
    steps = math.ceil(batches_of(sharing, batch_size, rows, workers) / recipe.accumulate)
    return Course(
        sharing.every, steps, recipe.epochs * steps, sharing.average, sharing.warmup * steps, sharing.renew,
        sharing.own_masks, sharing.outer, torch.bfloat16 if sharing.dtype == "bf16" else torch.float32, debug,
    )  # fmt: skip


def batches_of(sharing: Sharing, batch_size: int, rows: int, workers: int) -> int:
    """Count the batches of an epoch: as many on every rank, whose shards may differ by one row.

    Returns:
        The number.
    """
    return math.ceil((rows // workers if sharing.shard else rows) / batch_size)


def shard_of(rows: Rows, rank: int, size: int, seed: int) -> Rows:
    """Deal rows out: the workers' shards are disjoint, cover all rows, and differ by one row at most.

    Returns:
        The rows of one worker, ascending; all of them for a single worker.
    """
    return rows if size == 1 else rows[sorted(permutation(len(rows), seed, _SHARDS)[rank::size])]


def seed_of(seed: int, rank: int) -> int:
    """The seed of one worker's data order and dropout; rank 0 has the run's own."""
    return seed + (rank << 32)


def train_worker(
    task: Task,
    model: nn.Module,
    sharing: Sharing,
    recipe: Recipe,
    batch_size: int,
    device: Device,
    world: Collectives,
    *,
    name: str,
    resume: JointResume | None = None,
    log: OnMerge | None = None,
    debug: bool = False,
    splits: tuple[str, str] | None = None,
) -> tuple[FitResult, Rounds]:
    """Train this rank's copy of the model, in place, together with the other ranks.

    Args:
        task: the data and the metric.
        model: the base, the same on every rank, on the device.
        sharing: how the ranks share the work.
        recipe: how each trains; its seed also draws shards, masks and the order of the data.
        batch_size: examples per batch of one worker.
        device: where, and in which precision.
        world: the ranks.
        name: what the progress display calls it.
        resume: where this rank's unfinished run is kept.
        log: told of each merge, on rank 0.
        debug: check after each merge that all ranks are bitwise equal.
        splits: to train and choose masks on, and to score; None: train, and the reported one.

    Returns:
        The history of this rank, and the rounds with their records and bytes.

    Raises:
        ParamsError: if the settings do not fit each other.
        DivergedError: if training diverged on any rank; on all of them.
    """  # noqa: DOC502 - raised by what it calls
    where, rank, seed = device.device, world.rank, seed_of(recipe.seed, world.rank)
    part, judged = splits or ("train", task.reported)
    rows = task.rows(part)
    course = course_of(sharing, recipe, batch_size, len(rows), world.size, debug=debug)
    length = batches_of(sharing, batch_size, len(rows), world.size)
    mine = shard_of(rows, rank, world.size, recipe.seed) if sharing.shard else rows

    def batches(epoch: int) -> Batches:
        made = task.batches(part, batch_size, seed=seed, epoch=epoch, device=where, among=mine)
        made.groups = made.groups[:length]
        return made

    def choose(model: nn.Module, number: int) -> Mask:
        return choose_mask(task, model, sharing, recipe.seed, number, world, split=part)

    first = dense(ParameterIndex.of(model)) if sharing.warmup else choose(model, 0)
    with ProgressLine(name) as line, MaskedParameters(model, first) as masked:
        rounds = Rounds(
            masked, course, head=sharing.head, choose=choose, log=log,
            evaluate=lambda m: task.evaluate(m, judged, EVALUATION * batch_size, where, device.autocast),
        )  # fmt: skip
        if resume is not None:
            resume.wire = rounds.wire
        try:
            result = fit(
                model,
                batches,
                masked=masked,
                recipe=replace(recipe, seed=seed),
                device=device,
                channels_last=task.kind == "image" and where.type == "cuda",
                resume=resume,
                progress=(lambda p: line.update(p.step, p.steps)) if rank == 0 else None,
                sync=rounds,
            )
        except DivergedError:
            rounds.give_up()
            raise
    return result, rounds


def choose_mask(
    task: Task,
    model: nn.Module,
    sharing: Sharing,
    seed: int,
    number: int,
    world: Collectives,
    split: str = "train",
) -> Mask:
    """Choose this rank's mask on a model that is the same on every rank.

    Args:
        task: for the examples that scores are averaged over, the same on every rank.
        model: merged.
        sharing: method, density and whether masks are the workers' own.
        seed: of the run.
        number: of the choice, from 0; renewed masks see other examples and draws.
        world: the ranks.
        split: what scores are averaged over.

    Returns:
        The mask.
    """
    drawn = seed + number * 1_000_003
    drawn_head = number == 0 and not sharing.warmup
    how = {key: value for key, value in sharing.score.items() if drawn_head or key not in ("heads", "warm_head")}
    scores = scores_for(sharing.method, task, model, seed=drawn, head=sharing.head, split=split, **how)
    if not sharing.own_masks or world.size == 1:
        return mask_for(
            sharing.method, model, density=sharing.density, head=sharing.head, seed=drawn, ranking=scores
        )
    if scores is None:
        scores = random_scores(ParameterIndex.of(model), drawn)
    return interleaved(scores, sharing.density, world.size, world.rank, sharing.head)
