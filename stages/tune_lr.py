"""Find the learning rate of a task's methods, on a split of train; the reported split is never read.

    fishmask tune-lr --task words                 # every method; --method fish for one
    fishmask tune-lr --task words --setting density-5e-4 --method fish --method random

Not a stage of the pipeline: it writes its findings to params.yaml, which the pipeline reads, and what it tried to
``metrics/tune-lr/<task>.json``, which the report shows. A fifth of train (whole groups) is held out as ``tune``;
scores, masks and training see the other four fifths (``fit``) alone. Rates stand three to a decade around the rate
in params.yaml; successive halving (``pipeline.training.halving``) gives the better ones more seeds.
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.errors import DivergedError
from pipeline.files import write_json
from pipeline.masks.mask import Mask
from pipeline.params import Params
from pipeline.runtime.workspace import Cell, Workspace
from pipeline.runtime.yaml_files import edit_yaml
from pipeline.schema import SettingParams, TaskParams
from pipeline.tasks.base import Task
from pipeline.tasks.choosing import Learning, choose, trained_model
from pipeline.tasks.fitting import fit_task
from pipeline.tasks.scoring import scores_for
from pipeline.training.device import Device, choose_device
from pipeline.training.halving import Scores, best_rate, halving
from pipeline.training.methods import method_named
from pipeline.training.recipe import Recipe
from stages.runner import use_threads

REACH = 4
"""Rates of the first rung on either side of the one in params.yaml: nine rates over 2.7 decades."""


def tune(
    workspace: Workspace,
    params: Params,
    name: str,
    methods: Iterable[str] | None,
    seeds: int,
    write: bool,
    reach: int = REACH,
    setting: str = "main",
) -> dict[str, float]:
    """Search the learning rates of one task.

    Args:
        workspace: the project; the task must be fetched.
        params: its settings.
        name: the task.
        methods: which methods; by default all that have a rate for the task, at the setting where it has rates.
        seeds: rungs: how many of the profile's seeds the best rates are trained with.
        write: put the best rates into params.yaml.
        reach: rates of the first rung on either side of the present one.
        setting: the density and examples to tune at, where they are not the task's own.

    Returns:
        method -> the best rate: by its score on ``tune`` and its neighbours', see ``halving.best_rate``.
    """
    settings, own = at_setting(params, name, setting), params.settings[setting].lr.get(name)
    use_threads(params.threads)
    device = choose_device(params.device, params.precision)
    task = Task.load(workspace.out(Cell("fetch", name)), settings.model, settings.metric)
    best: dict[str, float] = {}
    log: dict[str, Scores] = {}
    for method in methods or own or [m for m, known in params.methods.items() if name in known.lr]:
        start = params.at(params.rate_key(name, method, setting))

        @cache
        def mask(seed: int, method: str = method) -> Mask:
            return tuning_mask(task, params, settings, method, seed, device, best.get("dense"))

        def score(rate: float, seed: int, method: str = method) -> float:
            return tuning_score(task, settings, method, mask(seed, method), rate, seed, device)

        tried = halving(start, reach, params.seeds[:seeds], score)
        best[method] = best_rate(tried)
        log[method] = tried
        show(name, method, settings.metric, tried, best[method])
    record(workspace, name, setting, settings, task, log)
    if write:
        found = {params.rate_key(name, method, setting): rate for method, rate in best.items()}
        edit_yaml(workspace.root / "params.yaml", found)
    return best


def at_setting(params: Params, name: str, setting: str) -> TaskParams:
    """The task as a setting has it.

    Returns:
        Its settings, with the setting's density and examples.
    """
    task: TaskParams = params.at(f"tasks.{name}")
    there: SettingParams = params.at(f"settings.{setting}")
    score = task.score.model_copy(update={"examples": [there.examples]} if there.examples else {})
    return task.model_copy(update={"density": there.density or task.density, "score": score})


def tuning_mask(
    task: Task, params: Params, settings: TaskParams, method: str, seed: int, device: Device, dense: float | None
) -> Mask:
    """Choose a method's mask from the ``fit`` part of train alone.

    Args:
        task: the data.
        params: the project's settings.
        settings: the task's, at the setting tuned for.
        method: the method.
        seed: of head, draw and examples.
        device: where, and in which precision a learned mask is learned.
        dense: the rate found for ``dense``, at which a mask is learned; None takes that of ``params``.

    Returns:
        The mask.
    """
    model = task.model(seed).to(device.device)
    score = settings.score.variant(method_named(method).variant)
    scores = scores_for(
        method, task, model, examples=score.examples[-1], seed=seed, split="fit", head=settings.head, **score.how()
    )
    learning = None
    if method_named(method).strategy != "learned":
        model.cpu()  # as the mask stage has it
    else:
        lr = dense or params.at(f"methods.dense.lr.{task.name}")
        recipe = Recipe(lr=lr, seed=seed, **settings.train.model_dump(exclude={"batch_size"}))
        how = params.methods[method].learn
        learning = Learning(recipe, settings.train.batch_size, device, how.epochs, how.penalty, "fit")
    _, mask = choose(
        method, task, model, density=settings.density, head=settings.head, seed=seed, ranking=scores,
        learning=learning,
    )  # fmt: skip
    return mask


def tuning_score(
    task: Task, settings: TaskParams, method: str, mask: Mask, rate: float, seed: int, device: Device
) -> float:
    """Train on ``fit`` and score on ``tune``.

    Args:
        task: the data.
        settings: the task's.
        method: the method, for the progress display.
        mask: what is trained.
        rate: the learning rate.
        seed: of head, order of the data and dropout.
        device: where, and in which precision.

    Returns:
        The task's metric after the last epoch; -inf for a run that diverges.
    """
    recipe = Recipe(lr=rate, seed=seed, **settings.train.model_dump(exclude={"batch_size"}))
    name = f"tune {task.name} {method} lr {rate:g} seed {seed}"
    model = trained_model(task.model(seed), mask).to(device.device)
    try:
        result = fit_task(
            task, model, mask, recipe, settings.train.batch_size, device, name=name, splits=("fit", "tune")
        )
    except DivergedError:
        return -math.inf
    return result.history[-1][task.metric]


def show(task: str, method: str, metric: str, tried: dict[float, list[float]], best: float) -> None:
    """Print what was tried for a method, the best rate marked."""
    table = Table("lr", f"{metric} on tune", "seeds", title=f"{task} {method}")
    for rate, scores in tried.items():
        star = " *" if rate == best else ""
        table.add_row(f"{rate:g}{star}", f"{statistics.mean(scores):.4f}", " ".join(f"{s:.4f}" for s in scores))
    Console().print(table)


def record(
    workspace: Workspace, name: str, setting: str, settings: TaskParams, task: Task, tried: Mapping[str, Scores]
) -> None:
    """Keep what was tried beside the metrics of the pipeline, for the report and the reader.

    Args:
        workspace: the project.
        name: the task's name.
        setting: the setting tuned for.
        settings: the task's, at that setting.
        task: the data.
        tried: method -> rate -> its scores; methods recorded before stay.
    """
    file = workspace.metrics(Cell("tune-lr", name, setting=None if setting == "main" else setting))
    before = json.loads(file.read_text())["methods"] if file.is_file() else {}
    rows = {split: len(task.rows(split)) for split in ("fit", "tune")}
    document: dict[str, Any] = {"task": name, "setting": setting, "density": settings.density}
    document |= {"metric": settings.metric, "rows": rows, "train": settings.train.model_dump()}
    file.parent.mkdir(parents=True, exist_ok=True)
    log = {
        method: {
            "best": best_rate(scores),
            "tried": {f"{r:g}": [x if math.isfinite(x) else None for x in scores[r]] for r in scores},
        }
        for method, scores in tried.items()
    }
    write_json(file, document | {"methods": dict(sorted((before | log).items()))})
