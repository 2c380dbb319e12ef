"""Choose the coordinates that one method trains, at one setting of density and examples.

    python -m stages.mask words fish main        # or: fishmask mask --task words --method fish

Writes ``artifacts/mask/<task>-<method>-<setting>/seed-N/mask.safetensors``. Takes seconds; a method that
learns its mask takes as long as dense training.
"""

from pathlib import Path
from typing import Any

from pipeline.errors import ArtifactError
from pipeline.masks.mask import Mask
from pipeline.masks.ranking import Ranking
from pipeline.masks.selection import layer_of
from pipeline.parameters import base_digest
from pipeline.runtime.workspace import VERSION, ranking_file
from pipeline.tasks.base import Task
from pipeline.tasks.choosing import Learning, choose, parameters_of
from pipeline.training.device import choose_device
from pipeline.training.fingerprint import fingerprint
from pipeline.training.methods import method_named
from pipeline.training.recipe import Recipe
from stages.runner import Stage, main, use_threads


def run(stage: Stage) -> None:
    """Cut the mask of one cell for every seed."""
    cell = stage.cell
    method = method_named(cell.method or "")
    setting = stage.read(f"settings.{cell.setting}")
    own, counts = stage.of_task("density"), stage.of_task("score.examples") if method.needs_ranking else None
    density, examples = setting.density or own, (setting.examples or counts[-1]) if counts else None
    head = stage.of_task("head")
    task = Task.load(stage.input("fetch"), stage.of_task("model"), stage.of_task("metric"))
    learning = {seed: _learning(stage, seed) if method.strategy == "learned" else None for seed in stage.seeds}
    key = fingerprint(cell=cell, settings=stage.settings, data=task.data_digest)
    with stage.held(key, data_digest=task.data_digest):
        stage.record(examples=None)
        for seed, how in learning.items():
            ranking = None
            if examples is not None:
                ranking = _ranking(ranking_file(stage.input("score") / f"seed-{seed}", method.variant, examples))
                stage.record(examples=ranking.info["examples"])  # fewer than asked for, where train has fewer
            model = task.model(seed).to(how.device.device) if how else task.model(seed)
            chosen_for = {"base": base_digest(model), "data": task.data_digest, "model": task.model_source}
            _, mask = choose(
                method.name, task, model, density=density, head=head, seed=seed, ranking=ranking, learning=how
            )
            mask.info = chosen_for | mask.info | {"task": task.name, "setting": cell.setting, "seed": seed}
            mask.info["fishmask"] = VERSION
            size = mask.save(stage.folder(seed) / "mask.safetensors")
            share = mask.nnz / parameters_of(mask)
            stage.record(seed, nnz=mask.nnz, density=share, bytes=size, digest=mask.digest, layers=by_layer(mask))


def _ranking(file: Path) -> Ranking:
    """Read what the score stage left."""
    if not file.is_file():
        raise ArtifactError(
            f"{file}: no such ranking; the score stage makes one for each seed, count of score.examples and name "
            "of score.variants: run it, or name one of those"
        )
    return Ranking.load(file)


def by_layer(mask: Mask) -> list[dict[str, Any]]:
    """Count a mask's coordinates layer by layer.

    Returns:
        A list, which keeps the model's order in the file: each ``layer``, its ``count`` of ``numel``.
    """
    layers: dict[str, dict[str, Any]] = {}
    for name in mask.index:
        group = layer_of(name)
        layer = layers.setdefault(group, {"layer": group, "count": 0, "numel": 0})
        layer["count"] += mask.count(name)
        layer["numel"] += mask.index.numel(name)
    return list(layers.values())


def _learning(stage: Stage, seed: int) -> Learning:
    """How a method learns its mask: by the task's recipe, at the rate of dense training."""
    use_threads(stage.read("threads"))
    device = choose_device(stage.read("device"), stage.read("precision"))
    train, learn = stage.of_task("train"), stage.read(f"methods.{stage.cell.method}.learn")
    lr = stage.read(f"methods.dense.lr.{stage.cell.task}")
    recipe = Recipe(lr=lr, seed=seed, **train.model_dump(exclude={"batch_size"}))
    return Learning(recipe, train.batch_size, device, learn.epochs, learn.penalty)


if __name__ == "__main__":
    main("mask", run, ("task", "method", "setting"))
