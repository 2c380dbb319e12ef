"""Find the learning rates of a setting of ``distribute``, on a split of train; the reported split is never read.

    fishmask tune-lr --task words --distribute sum-own-6

Fewer steps on each worker, summed changes and a dense warm-up want other rates than one worker does. As
``stages.tune_lr``, with the setting's own workers, merges and epochs in every run: they are started once, under
torchrun, and make all runs of the search together. Rank 0 writes what was tried to
``metrics/tune-lr/<task>-distribute-<setting>.json``, which the report shows, and the rates to params.yaml.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import replace

import torch

from pipeline.distributed.collectives import Collectives
from pipeline.distributed.launch import is_worker, joined, launch
from pipeline.errors import DivergedError, ParamsError
from pipeline.params import Params
from pipeline.runtime.workspace import Cell, Workspace
from pipeline.runtime.yaml_files import edit_yaml
from pipeline.schema import TaskParams
from pipeline.tasks.base import Task
from pipeline.tasks.sharing import Sharing, train_worker
from pipeline.training.device import Device, choose_device
from pipeline.training.halving import Scores, best_rate, halving
from pipeline.training.recipe import Recipe
from stages.distribute import Plan, plan
from stages.runner import Stage, use_threads
from stages.tune_lr import record, show

REACH = 3
"""Rates of the first rung on either side of the present one: seven rates over two decades."""


def tune(
    workspace: Workspace,
    params: Params,
    name: str,
    methods: Sequence[str] | None,
    seeds: int,
    write: bool,
    setting: str,
    reach: int = REACH,
) -> None:
    """Start the workers, or be one of those that search.

    Args:
        workspace: the project; the task must be fetched.
        params: its settings.
        name: the task.
        methods: which ones; by default those that the grid crosses with the setting.
        seeds: rungs: how many of the profile's seeds the best rates are trained with.
        write: put the best rates into params.yaml.
        setting: a name below ``distribute``.
        reach: rates of the first rung on either side of the present one.

    Raises:
        ParamsError: if the grid names no method for the setting, or the setting does not fit the task.
    """  # noqa: DOC502 - the latter is raised by what it calls
    wanted = params.at(f"distribute.{setting}")
    crossed = {method for task, method, other in params.grid.distribute.cells if (task, other) == (name, setting)}
    if not (methods := methods or sorted(crossed)):
        raise ParamsError(f"grid.distribute crosses no method with {name} and {setting}; name one with --method")
    stages = {m: Stage(Cell("distribute", name, m, setting), params, workspace, track=False) for m in methods}
    plans = {method: plan(stage, wanted) for method, stage in stages.items()}
    if not is_worker():
        launch(wanted.workers, threads=params.threads)
        return
    use_threads(max(1, params.threads // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    device = choose_device(params.device, params.precision)
    found: dict[str, Scores] = {}
    with joined(cuda=device.device.type == "cuda") as world:
        for method, planned in plans.items():

            def score(rate: float, seed: int, planned: Plan = planned) -> float:
                task, sharing, recipe, batch_size = planned
                return shared_score(task, sharing, replace(recipe, lr=rate, seed=seed), batch_size, device, world)

            tried = halving(planned[2].lr, reach, params.seeds[:seeds], score)
            found[method] = tried
            if world.rank == 0:
                show(name, f"{method} {setting}", planned[0].metric, tried, best_rate(tried))
        if world.rank == 0:
            task, sharing, recipe, _ = next(iter(plans.values()))
            own: TaskParams = params.at(f"tasks.{name}")
            train = own.train.model_copy(update={"epochs": recipe.epochs})
            settings = own.model_copy(update={"density": sharing.density, "train": train})
            record(workspace, name, f"distribute-{setting}", settings, task, found)
            _write(workspace, setting, wanted.lr or {}, found, write)
        world.largest("control", 0)  # all end together


def shared_score(
    task: Task, sharing: Sharing, recipe: Recipe, batch_size: int, device: Device, world: Collectives
) -> float:
    """Train together on ``fit``, and score on ``tune``.

    Args:
        task: the data.
        sharing: how the workers share the work.
        recipe: how each trains.
        batch_size: examples per batch of one worker.
        device: where, and in which precision.
        world: the ranks.

    Returns:
        The task's metric after the last merge, the same on every rank; -inf for a run that diverges.
    """
    model = task.model(recipe.seed).to(device.device)
    name = f"tune {task.name} {sharing.method} lr {recipe.lr:g} seed {recipe.seed}"
    try:
        _, rounds = train_worker(
            task, model, sharing, recipe, batch_size, device, world, name=name, splits=("fit", "tune")
        )
    except DivergedError:
        return -math.inf
    mine = rounds.records[-1][task.metric] if world.rank == 0 else 0.0
    return float(world.gather("control", torch.tensor([mine], dtype=torch.float64))[0])


def _write(
    workspace: Workspace, setting: str, known: dict[str, float], found: dict[str, Scores], write: bool
) -> None:
    """Put the best rates where the setting has some already; else say what to add."""
    best = {method: best_rate(scores) for method, scores in found.items()}
    if write and best.keys() <= known.keys():
        edit_yaml(workspace.root / "params.yaml", {f"distribute.{setting}.lr.{m}": r for m, r in best.items()})
        return
    rates = ", ".join(f"{method}: {rate:g}" for method, rate in best.items())
    print(f"params.yaml: to use them, give distribute.{setting} the key lr: {{{rates}}}")
