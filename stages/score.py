"""Score every parameter of one task's model by Fisher information and keep the ranking's top.

    python -m stages.score words        # or: fishmask score --task words

Writes ``artifacts/score/<task>/seed-N/examples-M.safetensors``: one ranking per number of examples, all from a
single pass, each enough for every density of a sweep. Takes seconds on the demo's tasks.
"""

import torch

from pipeline.fisher import fisher_diagonal
from pipeline.masks.ranking import Ranking
from pipeline.parameters import base_digest
from pipeline.params import ScoreParams
from pipeline.progress import ProgressLine
from pipeline.tasks.base import Task
from pipeline.training.device import Device, choose_device
from pipeline.training.resume import fingerprint
from pipeline.workspace import VERSION
from stages.runner import Stage, main, use_threads


def run(stage: Stage) -> None:
    """Rank the parameters of ``stage.cell.task`` for every seed."""
    settings, head = stage.of_task("score"), stage.of_task("head")
    use_threads(stage.read("threads"))
    device = choose_device(stage.read("device"), "fp32")
    task = Task.load(stage.input("fetch"), stage.of_task("model"), stage.of_task("metric"))
    key = fingerprint(cell=stage.cell, settings=stage.settings, data=task.data_digest)
    with stage.held(key, data_digest=task.data_digest):
        for seed in stage.seeds:
            _rank(stage, task, settings, head, device, seed)
        stage.time(device=device.reason)


def _rank(stage: Stage, task: Task, settings: ScoreParams, head: list[str], device: Device, seed: int) -> None:
    """Score one seed's model on more and more examples, and save a ranking at each count asked for."""
    model = task.model(seed).to(device.device)
    info = {
        "task": task.name,
        "model": task.model_source,
        "kind": settings.kind,
        "power": settings.power,
        "seed": seed,
        "data": task.data_digest,
        "base": base_digest(model),
        "fishmask": VERSION,
    }
    scores: dict[str, torch.Tensor] = {}
    seen, name = 0, f"score {stage.cell.name} seed {seed}"
    with ProgressLine(name) as line:
        for count in settings.examples:
            batches = task.examples(count, settings.batch_size, seed=seed, skip=seen)
            if batches.examples:
                part = fisher_diagonal(model, batches, kind=settings.kind, power=settings.power)
                # The mean over all examples so far: weigh the new ones' mean by their share.
                share = batches.examples / (seen + batches.examples)
                scores = {n: s.lerp_(part[n], share) for n, s in scores.items()} if seen else part
                seen += batches.examples
            ranking = Ranking.of(scores, settings.keep, head, info | {"examples": seen})
            size = ranking.save(stage.folder(seed) / f"examples-{count}.safetensors")
            stage.record(seed, **{f"examples-{count}": {"bytes": size, "digest": ranking.digest}})
            line.update(count, settings.examples[-1], "examples")


if __name__ == "__main__":
    main("score", run, ("task",))
