"""Train one cell of Table 4: every epoch's checkpoint is a step of a chain, counted, restored and scored.

    python -m stages.checkpoint digits fish fixed-2e-2    # or: fishmask checkpoint run --task digits ...

Writes ``artifacts/checkpoint/<task>-<method>-<setting>/seed-N/``: the chain, as ``fishmask checkpoint`` reads it.
Says first what it will cost, from a probe. A seed of ``digits`` takes seconds on two CPU cores. Killed at any
moment and run again, it ends with the same bytes: run and chain are continued from ``.resume/``.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from pipeline.errors import DivergedError
from pipeline.files import write_json
from pipeline.masks.mask import Mask
from pipeline.params import CheckpointParams
from pipeline.tasks.base import Task
from pipeline.tasks.checkpointing import Checkpoints, Masks
from pipeline.tasks.fitting import fit_task
from pipeline.tasks.probe import estimate
from pipeline.tracking import Run
from pipeline.training.device import choose_device
from pipeline.training.recipe import Recipe
from pipeline.training.resume import ResumeFile, fingerprint
from pipeline.workspace import code_digest
from stages.runner import Stage, main, use_threads


def run(stage: Stage) -> None:
    """Train ``stage.cell`` for every seed."""
    cell, method = stage.cell, stage.cell.method or ""
    setting: CheckpointParams = stage.read(f"checkpoints.{cell.setting}")
    settings, metric, score = stage.of_task("train"), stage.of_task("metric"), stage.of_task("score")
    lr = stage.read(f"methods.{method}.lr.{cell.task}")
    recipe = settings.model_dump(exclude={"batch_size"}) | {"lr": (setting.lr or {}).get(method, lr)}
    recipe |= {key: value for key in ("epochs", "weight_decay") if (value := getattr(setting, key)) is not None}
    if setting.examples is not None:
        score = score.model_copy(update={"examples": [setting.examples]})
    density, head = stage.of_task("density"), stage.of_task("head")
    density = setting.density or density
    use_threads(stage.read("threads"))
    device = choose_device(stage.read("device"), stage.read("precision"))
    task = Task.load(stage.input("fetch"), stage.of_task("model"), metric)
    inputs = {"settings": stage.settings, "data": task.data_digest, "device": device.reason, "code": code_digest()}
    keys = {seed: fingerprint(**inputs, cell=cell, seed=seed) for seed in stage.seeds}
    folders = {seed: stage.workspace.resume("checkpoint", key) for seed, key in keys.items()}
    with stage.held(fingerprint(cell=cell, keys=keys), data_digest=task.data_digest) as run:
        stage.record(metric=metric, lr=recipe["lr"], weight_decay=recipe["weight_decay"], data=task.summary())
        stage.record(every=setting.every, weight_decay_scope=setting.weight_decay_scope)
        left = [seed for seed, folder in folders.items() if not (folder / "result.json").is_file()]
        scores: list[float] = []
        for seed in stage.seeds:
            folder = folders[seed]
            if seed in left:
                masks = Masks(task, method, density, head, score, seed, device)
                with run.child(seed, fingerprint=keys[seed]) as child:
                    probed = len(left) if seed == left[0] else 0
                    _train(stage, masks, setting, Recipe(seed=seed, **recipe), folder, child, probed)
            result = json.loads((folder / "result.json").read_text())
            if result["metric"] is not None:
                shutil.copytree(folder / "chain", stage.folder(seed), dirs_exist_ok=True)
                scores.append(result["metric"])
            stage.record(seed, **result)
        stage.log_scores(run, metric, scores)
        stage.time(device=device.reason)
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)


def _train(
    stage: Stage, masks: Masks, setting: CheckpointParams, recipe: Recipe, folder: Path, run: Run, probed: int
) -> None:
    """Train one seed and leave its chain and its result in the resume folder, the result last.

    Where ``probed`` is not 0, say first what so many seeds will cost.
    """
    cell, task, seed, file = stage.cell, masks.task, masks.seed, folder / "mask.safetensors"
    batch_size, leak = stage.of_task("train").batch_size, setting.weight_decay_scope == "all"
    model = task.model(seed).to(masks.device.device)
    folder.mkdir(parents=True, exist_ok=True)
    mask = Mask.load(file) if file.is_file() else masks.choose(model, 0)
    mask.save(file)
    if probed:
        cost = estimate(masks, mask, recipe, batch_size, setting.every, task.reported, leak=leak)
        print(
            f"checkpoint {cell.name}: {recipe.epochs} epochs, seeds to go: {probed}; {cost.text(probed)}",
            file=sys.stderr,
        )
        cost.check_room(folder, probed)
    info = stage.provenance(task, seed)
    checkpoints = Checkpoints(folder / "chain", info, masks, mask, setting.every, task.reported, batch_size)
    outcome: dict[str, Any] = {"parameters": mask.index.total, "nnz": mask.nnz, "density": mask.density}
    try:
        result = fit_task(
            task, model, mask, recipe, batch_size, masks.device,
            name=f"checkpoint {cell.name} seed {seed}",
            resume=ResumeFile(folder / "state.safetensors", folder.name),
            log=run.log,
            after_epoch=checkpoints,
            leak=leak,
        )  # fmt: skip
    except DivergedError as error:
        outcome |= {"metric": None, "diverged": str(error), "epochs": checkpoints.rows()}
    else:
        outcome |= {"metric": result.history[-1][task.metric], "epochs": checkpoints.rows()}
        outcome |= checkpoints.summary()
        peak = result.peak_memory_bytes / 2**20
        stage.time(**{f"seed-{seed}": {"seconds": round(result.seconds, 3), "peak_mib": round(peak, 1)}})
        sizes = {key: outcome[key] for key in ("checkpoint_bytes", "dense_bytes")}
        run.log(sizes | {"seconds": result.seconds, "peak_mib": peak}, step=result.steps)
    write_json(folder / "result.json", outcome)


if __name__ == "__main__":
    main("checkpoint", run, ("task", "method", "setting"))
