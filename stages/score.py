"""Score every parameter of one task's model by Fisher information and keep the ranking's top.

    python -m stages.score words        # or: fishmask score --task words

Writes ``artifacts/score/<task>/seed-N/examples-M.safetensors``: one ranking per number of examples, each enough
for every density of a sweep; and ``<variant>-examples-M.safetensors`` for each of the task's ``score.variants``.
Those that differ in their selection alone share one pass over the examples. Takes seconds on the demo's tasks.
"""

from typing import Any

from torch import Tensor

from pipeline.masks.ranking import Ranking
from pipeline.masks.selection import selected
from pipeline.parameters import base_digest
from pipeline.runtime.progress import ProgressLine
from pipeline.runtime.workspace import VERSION, ranking_file
from pipeline.schema import ScoreParams
from pipeline.tasks.base import Task
from pipeline.tasks.scoring import raw_scores
from pipeline.training.device import Device, choose_device
from pipeline.training.fingerprint import fingerprint
from stages.runner import Stage, main, use_threads

_PASS = ("kind", "power", "heads", "warm_head")  # what a pass over the examples depends on


def run(stage: Stage) -> None:
    """Rank the parameters of ``stage.cell.task`` for every seed."""
    settings, head = stage.of_task("score"), stage.of_task("head")
    use_threads(stage.read("threads"))
    device = choose_device(stage.read("device"), "fp32")
    task = Task.load(stage.input("fetch"), stage.of_task("model"), stage.of_task("metric"))
    key = fingerprint(cell=stage.cell, settings=stage.settings, data=task.data_digest)
    passes: dict[tuple[Any, ...], dict[str, ScoreParams]] = {}
    for name in ("", *settings.variants):
        how = settings.variant(name)
        passes.setdefault(tuple(getattr(how, part) for part in _PASS), {})[name] = how
    with stage.held(key, data_digest=task.data_digest):
        for seed in stage.seeds:
            for hows in passes.values():
                _rank(stage, task, hows, head, device, seed)
        stage.time(device=device.reason)


def _rank(
    stage: Stage, task: Task, hows: dict[str, ScoreParams], head: list[str], device: Device, seed: int
) -> None:
    """Score one seed's model on more and more examples, and save a ranking of each kind at each count."""
    model = task.model(seed).to(device.device)
    how = next(iter(hows.values()))
    info = {"task": task.name, "model": task.model_source, "seed": seed, "data": task.data_digest}
    info |= {part: getattr(how, part) for part in _PASS} | {"base": base_digest(model), "fishmask": VERSION}
    scores: dict[str, Tensor] = {}
    seen, name = 0, f"score {stage.cell.name} seed {seed}"
    with ProgressLine(name) as line:
        for count in how.examples:
            if how.warm_head:
                seen = 0  # a warmed head has seen its examples: each count has one of its own
            batches = task.examples(count, how.batch_size, seed=seed, skip=seen, device=device.device)
            if batches.examples:
                arguments = {part: getattr(how, part) for part in _PASS}
                part = raw_scores(task, model, batches, seed=seed, head=head, **arguments)
                # The mean over all examples so far: weigh the new ones' mean by their share.
                share = batches.examples / (seen + batches.examples)
                scores = {n: s.lerp_(part[n], share) for n, s in scores.items()} if seen else part
                seen += batches.examples
            for variant, own in hows.items():
                told = info | {"examples": seen, "selection": own.selection, "exclude": own.exclude}
                ranking = Ranking.of(selected(scores, own.selection, own.exclude), own.keep, head, told)
                file = ranking_file(stage.folder(seed), variant, count)
                stage.record(seed, **{file.stem: {"bytes": ranking.save(file), "digest": ranking.digest}})
            line.update(count, how.examples[-1], "examples")


if __name__ == "__main__":
    main("score", run, ("task",))
