"""Choose the coordinates that one method trains, at one setting of density and examples.

    python -m stages.mask words fish main        # or: fishmask mask --task words --method fish

Writes ``artifacts/mask/<task>-<method>-<setting>/seed-N/mask.safetensors``. Takes seconds.
"""

from pipeline.masks.ranking import Ranking
from pipeline.tasks.base import Task
from pipeline.training.methods import mask_for, method_named
from pipeline.training.resume import fingerprint
from pipeline.workspace import VERSION, ranking_file
from stages.runner import Stage, main


def run(stage: Stage) -> None:
    """Cut the mask of one cell for every seed."""
    cell = stage.cell
    method = method_named(cell.method or "")
    setting = stage.read(f"settings.{cell.setting}")
    own, counts = stage.of_task("density"), stage.of_task("score.examples") if method.needs_ranking else None
    density, examples = setting.density or own, (setting.examples or counts[-1]) if counts else None
    head = stage.of_task("head")
    task = Task.load(stage.input("fetch"), stage.of_task("model"), stage.of_task("metric"))
    key = fingerprint(cell=cell, settings=stage.settings, data=task.data_digest)
    with stage.held(key, data_digest=task.data_digest):
        stage.record(examples=examples)
        for seed in stage.seeds:
            ranking = None
            if examples is not None:
                folder = stage.input("score") / f"seed-{seed}"
                ranking = Ranking.load(ranking_file(folder, method.variant, examples))
            model = task.model(seed)
            mask = mask_for(method.name, model, density=density, head=head, seed=seed, ranking=ranking)
            mask.info |= {"task": task.name, "setting": cell.setting, "seed": seed, "fishmask": VERSION}
            size = mask.save(stage.folder(seed) / "mask.safetensors")
            layers = {name: {"count": mask.count(name), "numel": mask.index.numel(name)} for name in mask.index}
            stage.record(seed, nnz=mask.nnz, density=mask.density, bytes=size, digest=mask.digest, layers=layers)


if __name__ == "__main__":
    main("mask", run, ("task", "method", "setting"))
