"""Score every parameter of one task's model by Fisher information and keep the ranking's top.

    python -m stages.score words        # or: fishmask score --task words

Writes ``artifacts/score/<task>/seed-N/examples-M.safetensors``: one ranking per number of examples, all from a single
pass, each enough for every density of a sweep. Seconds on the demo's tasks, a minute per 1,024 long texts on a CPU.
"""

from pipeline.masks.ranking import Ranking
from pipeline.tasks.base import Task
from pipeline.training.device import choose_device
from pipeline.training.resume import fingerprint

from pipeline.fisher import fisher_diagonal
from pipeline.parameters import base_digest
from pipeline.progress import ProgressLine
from stages.runner import Stage, main, use_threads


def run(stage: Stage) -> None:
    """Rank the parameters of ``stage.cell.task`` for every seed."""
    settings, head = stage.of_task("score"), stage.of_task("head")
    use_threads(stage.read("threads"))
    device = choose_device(stage.read("device"), "fp32")
    task = Task.load(stage.input("fetch"), stage.of_task("model"), stage.of_task("metric"))
    with stage.held(fingerprint(cell=stage.cell, settings=stage.settings, data=task.data_digest)):
        for seed in stage.seeds:
            model = task.model(seed).to(device.device)
            base = base_digest(model)
            batches = task.examples(settings.examples[-1], settings.batch_size, seed=seed)
            total = None
            seen = 0
            with ProgressLine(f"score {stage.cell.name} seed {seed}") as line:
                for examples, part in _slices(batches, settings.examples):
                    scores = fisher_diagonal(model, part, kind=settings.kind, power=settings.power)
                    total = _merge(total, seen, scores, examples - seen)
                    seen = examples
                    info = {
                        "task": stage.cell.task, "kind": settings.kind, "power": settings.power,
                        "examples": examples, "seed": seed, "data": task.data_digest, "base": base,
                    }  # fmt: skip
                    ranking = Ranking.of(total, keep=settings.keep, always=head, info=info)
                    size = ranking.save(stage.folder(seed) / f"examples-{examples}.safetensors")
                    stage.record(seed, **{f"examples-{examples}": {"bytes": size, "digest": ranking.digest}})
                    line.update(examples, settings.examples[-1])
        stage.time(device=device.reason)


if __name__ == "__main__":
    main("score", run, ("task",))
