"""What training on one task costs the others, how far it moves, and how much masks of different tasks overlap.

Another task's judge is a head that was trained on the base with everything else frozen (the cell of ``head``). It
scores its own task before, on the base, and after, on the model trained for the first task. What it loses is what
the features it reads have lost. All of one base model, seed by seed.
"""

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.errors import ParamsError
from pipeline.files import write_json
from pipeline.masks.mask import Mask
from pipeline.parameters import ParameterIndex
from pipeline.params import Params
from pipeline.runtime.progress import ProgressLine
from pipeline.runtime.workspace import Cell, Workspace
from pipeline.tasks.base import Task
from pipeline.tasks.trained import trained
from pipeline.training.device import choose_device
from pipeline.training.methods import method_named


def measure(workspace: Workspace, params: Params, method: str, setting: str, probe: str) -> Path:
    """Measure every pair of the grid's tasks that share a base model, and write the metrics file.

    Args:
        workspace: the project, its cells trained.
        params: its settings.
        method: the method whose cells are judged.
        setting: their setting.
        probe: the method whose cells judge; it must train the head alone.

    Returns:
        ``metrics/forget/<method>-<setting>.json``: per task and seed the distance from the base, and for each
        other task its probe's score before and after; and the overlap of the masks, between tasks and seeds
        (none of adapters).

    Raises:
        ParamsError: if no two tasks of the grid share a base model, or the probe trains more than the head.
    """
    if method_named(probe).strategy != "head":
        raise ParamsError(f"--probe {probe}: it trains more than the head, so that it judges no body but its own")
    groups: dict[tuple[str, str | None], list[str]] = {}
    for name in params.grid.tasks:
        model = params.tasks[name].model
        groups.setdefault((model.source, model.revision), []).append(name)
    shared = [names for names in groups.values() if len(names) > 1]
    if not shared:
        raise ParamsError("grid.tasks: no two tasks share a base model, so there is nothing to forget")
    device = choose_device(params.device, "fp32").device
    found: dict[str, Any] = {}
    shares: dict[str, Any] = {"tasks": {}, "seeds": {}}
    for names in shared:
        tasks: dict[str, Task] = {}
        masks: dict[str, dict[int, Mask]] = {}
        for name in names:
            own = params.tasks[name]
            tasks[name] = Task.load(workspace.out(Cell("fetch", name)), own.model, own.metric)
            folder = workspace.out(Cell("mask", name, method, setting))
            files = {seed: folder / f"seed-{seed}" / "mask.safetensors" for seed in params.seeds}
            chosen = {seed: Mask.load(file) for seed, file in files.items()}
            if not any("adapter" in mask.info for mask in chosen.values()):  # whose values are none of the base's
                masks[name] = {seed: body(mask, own.head) for seed, mask in chosen.items()}
        for name in names:
            found[name] = {
                str(seed): _seed(workspace, params, tasks, name, method, setting, probe, seed, device)
                for seed in params.seeds
            }
        for key, rows in overlaps(masks).items():
            shares[key] |= rows
    metrics = {name: params.tasks[name].metric for name in found}
    file = workspace.metrics(Cell("forget", f"{method}-{setting}"))
    file.parent.mkdir(parents=True, exist_ok=True)
    document = {"method": method, "setting": setting, "probe": probe, "metrics": metrics, "tasks": found}
    write_json(file, document | {"overlap": shares})
    return file


def _seed(
    workspace: Workspace, params: Params, tasks: dict[str, Task], name: str, method: str, setting: str, probe: str,
    seed: int, device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """One seed of one task: its distance, and what every other task's probe says before and after."""
    own = tasks[name]
    base = own.model(seed)
    model = trained(own, workspace.out(Cell("train", name, method, setting)), seed)
    record: dict[str, Any] = {"distance": distance(base, model, params.tasks[name].head)}
    others = [other for other in tasks if other != name]
    with ProgressLine(f"forget {name} seed {seed}") as line:
        for count, other in enumerate(others):
            task, settings = tasks[other], params.tasks[other]
            judge = trained(task, workspace.out(Cell("train", other, probe, "main")), seed).to(device)
            size = 4 * settings.train.batch_size
            before = task.evaluate(judge, task.reported, size)[task.metric]
            transplant_(judge, model, settings.head)
            after = task.evaluate(judge, task.reported, size)[task.metric]
            record[other] = {"before": before, "after": after}
            line.update(count + 1, len(others))
    return record


def distance(base: nn.Module, model: nn.Module, head: list[str]) -> dict[str, float]:
    """How far a model's body is from its base: |theta - theta_0| and its share of |theta_0|, the head left out.

    Returns:
        ``l2`` and ``relative``.
    """
    moved = whole = 0.0
    after = dict(model.named_parameters())
    for name, before in base.named_parameters():
        if not _within(name, head):
            moved += float((after[name].detach().double() - before.detach().double()).square().sum())
            whole += float(before.detach().double().square().sum())
    return {"l2": math.sqrt(moved), "relative": math.sqrt(moved / whole) if whole else 0.0}


@torch.no_grad()
def transplant_(judge: nn.Module, model: nn.Module, head: list[str]) -> None:
    """Give a model the body of another one; its head stays its own."""
    source = dict(model.named_parameters())
    for name, parameter in judge.named_parameters():
        if not _within(name, head):
            parameter.copy_(source[name])


def _within(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def body(mask: Mask, head: list[str]) -> Mask:
    """A mask without the head, which every mask holds, and which differs in shape from task to task."""
    index = ParameterIndex({n: shape for n, shape in mask.index.shapes.items() if not _within(n, head)})
    return Mask.covering(
        index, [n for n in index if mask.whole(n)], {n: mask.indices[n] for n in index if not mask.whole(n)}
    )


def overlaps(masks: dict[str, dict[int, Mask]]) -> dict[str, dict[str, dict[str, float]]]:
    """Jaccard indices |A and B| / |A or B| between tasks, seed by seed, and between seeds, task by task.

    Args:
        masks: task -> seed -> mask, of one base, without heads. Two random masks of density d share d / (2 - d).

    Returns:
        ``tasks``: "a, b" -> seed -> index; ``seeds``: task -> "s, t" -> index.
    """
    tasks = {
        f"{a}, {b}": {str(seed): masks[a][seed].jaccard(masks[b][seed]) for seed in masks[a]}
        for a, b in combinations(masks, 2)
    }
    seeds = {
        name: {f"{s}, {t}": own[s].jaccard(own[t]) for s, t in combinations(own, 2)} for name, own in masks.items()
    }
    return {"tasks": tasks, "seeds": seeds}
