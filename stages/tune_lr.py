"""Find the learning rate of a task's methods, on a split of train; the reported split is never read.

    fishmask tune-lr --task words                 # every method; --method fish for one

Not a stage of the pipeline: it writes its findings to params.yaml, which the pipeline reads. A fifth of train
(whole groups) is held out as ``tune``; scores, masks and training see the other four fifths (``fit``) alone. Rates
stand three to a decade; the search starts from the rate in params.yaml and goes on while the best of those tried
has an untried neighbour.
"""

import json
import math
import statistics
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.errors import DivergedError
from pipeline.files import write_json
from pipeline.masks.mask import Mask
from pipeline.params import Params, TaskParams
from pipeline.tasks.base import Task
from pipeline.tasks.fitting import fit_task
from pipeline.tasks.scoring import scores_for
from pipeline.training.device import Device, choose_device
from pipeline.training.methods import mask_for, method_named
from pipeline.training.recipe import Recipe
from pipeline.workspace import Cell, Workspace
from pipeline.yaml_files import edit_yaml
from stages.runner import use_threads

STEPS = (1.0, 2.0, 5.0)
"""The rates of a decade."""


def tune(
    workspace: Workspace, params: Params, name: str, methods: Iterable[str] | None, seeds: int, write: bool
) -> dict[str, float]:
    """Search the learning rates of one task.

    Args:
        workspace: the project; the task must be fetched.
        params: its settings.
        name: the task.
        methods: which methods; all that have a rate by default.
        seeds: how many of the profile's seeds to train per rate.
        write: put the best rates into params.yaml.

    Returns:
        method -> the best rate: the highest mean score on ``tune``, the lower rate where two are equal.
    """
    settings: TaskParams = params.at(f"tasks.{name}")
    use_threads(params.threads)
    device = choose_device(params.device, params.precision)
    task = Task.load(workspace.out(Cell("fetch", name)), settings.model, settings.metric)
    best: dict[str, float] = {}
    log: dict[str, Any] = {}
    for method in methods or params.methods:
        start = params.at(f"methods.{method}.lr.{name}")
        masks = {seed: _mask(task, settings, method, seed, device) for seed in params.seeds[:seeds]}
        tried: dict[float, list[float]] = {}
        while (rate := next_rate({r: statistics.mean(s) for r, s in tried.items()}, start)) is not None:
            tried[rate] = [
                _score(task, settings, method, mask, rate, seed, device) for seed, mask in masks.items()
            ]
        best[method] = best_rate({r: statistics.mean(s) for r, s in tried.items()})
        log[method] = {"best": best[method], "tried": {f"{r:g}": s for r, s in sorted(tried.items())}}
        _show(name, method, settings.metric, tried, best[method])
    _record(workspace, name, settings, task, log)
    if write:
        edit_yaml(workspace.root / "params.yaml", {f"methods.{m}.lr.{name}": rate for m, rate in best.items()})
    return best


def next_rate(means: dict[float, float], start: float) -> float | None:
    """Choose the next rate to try: the start, its neighbours, then beyond the end where the best stands.

    Returns:
        The rate; None when the best has a tried neighbour on either side, or lies at the end of a plateau.
    """
    if not means:
        return grid(start, 0)
    peak = best_rate(means)
    for move in (1, -1):
        behind = grid(peak, -move)
        plateau = len(means) > 2 and means.get(behind) == means[peak]  # walking on along it would never end
        if grid(peak, move) not in means and not plateau:
            return grid(peak, move)
    return None


def best_rate(means: dict[float, float]) -> float:
    """Choose the rate with the highest mean; the lower one where two are equal."""
    return max(sorted(means), key=lambda rate: means[rate])


def grid(rate: float, move: int) -> float:
    """The rate of the 1-2-5 grid nearest to ``rate``, or its ``move``-th neighbour."""
    count = len(STEPS)
    places = range(-12 * count, 4 * count)
    value = {place: STEPS[place % count] * 10.0 ** (place // count) for place in places}
    nearest = min(places, key=lambda place: abs(math.log(value[place] / rate)))
    return float(f"{value[nearest + move]:.0e}")


def _mask(task: Task, settings: TaskParams, method: str, seed: int, device: Device) -> Mask:
    """The method's mask, from the ``fit`` part of train alone."""
    model = task.model(seed).to(device.device)
    score = settings.score.variant(method_named(method).variant)
    scores = scores_for(
        method, task, model, examples=score.examples[-1], seed=seed, split="fit", head=settings.head, **score.how()
    )
    return mask_for(method, model, density=settings.density, head=settings.head, seed=seed, ranking=scores)


def _score(
    task: Task, settings: TaskParams, method: str, mask: Mask, rate: float, seed: int, device: Device
) -> float:
    """Train on ``fit`` and score on ``tune``; a run that diverges scores -inf."""
    recipe = Recipe(lr=rate, seed=seed, **settings.train.model_dump(exclude={"batch_size"}))
    name = f"tune {task.name} {method} lr {rate:g} seed {seed}"
    model = task.model(seed).to(device.device)
    try:
        result = fit_task(
            task, model, mask, recipe, settings.train.batch_size, device, name=name, splits=("fit", "tune")
        )
    except DivergedError:
        return -math.inf
    return result.history[-1][task.metric]


def _show(task: str, method: str, metric: str, tried: dict[float, list[float]], best: float) -> None:
    table = Table("lr", f"{metric} on tune", "seeds", title=f"{task} {method}")
    for rate, scores in sorted(tried.items()):
        star = " *" if rate == best else ""
        table.add_row(f"{rate:g}{star}", f"{statistics.mean(scores):.4f}", " ".join(f"{s:.4f}" for s in scores))
    Console().print(table)


def _record(workspace: Workspace, name: str, settings: TaskParams, task: Task, log: dict[str, Any]) -> None:
    """Keep what was tried beside the metrics of the pipeline, for the report and the reader."""
    file = workspace.metrics(Cell("tune-lr", name))
    before = json.loads(file.read_text())["methods"] if file.is_file() else {}
    rows = {split: len(task.rows(split)) for split in ("fit", "tune")}
    document = {"task": name, "metric": settings.metric, "rows": rows, "train": settings.train.model_dump()}
    file.parent.mkdir(parents=True, exist_ok=True)
    finite = json.loads(json.dumps(before | log).replace("-Infinity", "null"))
    write_json(file, document | {"methods": dict(sorted(finite.items()))})
