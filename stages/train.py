"""Train one cell: only the coordinates of its mask, once per seed.

    python -m stages.train words fish main        # or: fishmask train --task words --method fish

Writes ``artifacts/train/<task>-<method>-<setting>/seed-N/delta.safetensors``: mask, buffers, and trained values
coded against the base's; for ``lora`` the folder ``adapter/`` instead, as PEFT reads it. On two CPU cores a seed
takes 5-30 s on ``words`` and less on ``digits``. Killed at any moment and run again, it ends with the same bytes:
an unfinished run is continued from ``.resume/``, a finished seed is taken from there.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from pipeline.deltas.base import Base
from pipeline.deltas.delta import Delta
from pipeline.errors import DivergedError
from pipeline.files import write_json
from pipeline.masks.mask import Mask
from pipeline.parameters import base_digest
from pipeline.runtime.atomic_folder import copy
from pipeline.runtime.workspace import code_digest
from pipeline.tasks.adapters import FOLDER as ADAPTER
from pipeline.tasks.adapters import save_adapter
from pipeline.tasks.base import Task
from pipeline.tasks.choosing import parameters_of, trained_model
from pipeline.tasks.fitting import fit_task
from pipeline.tasks.trained import DELTA
from pipeline.tracking import Run
from pipeline.training.device import Device, choose_device
from pipeline.training.fingerprint import fingerprint
from pipeline.training.recipe import Recipe
from pipeline.training.resume import ResumeFile
from stages.runner import Stage, main, use_threads

MISMATCHED = "validation_mismatched"  # MNLI's second validation split: other genres than its training data's


def run(stage: Stage) -> None:
    """Train ``stage.cell`` for every seed."""
    cell = stage.cell
    settings, metric = stage.of_task("train"), stage.of_task("metric")
    lr = stage.read(f"methods.{cell.method}.lr.{cell.task}")
    lr = stage.read(f"settings.{cell.setting}").lr.get(cell.task, {}).get(cell.method, lr)
    use_threads(stage.read("threads"))
    device = choose_device(stage.read("device"), stage.read("precision"))
    task = Task.load(stage.input("fetch"), stage.of_task("model"), metric)
    files = {s: stage.input("mask", "method", "setting") / f"seed-{s}/mask.safetensors" for s in stage.seeds}
    masks = {seed: Mask.load(file) for seed, file in files.items()}
    inputs = {"settings": stage.settings, "data": task.data_digest, "device": device.reason, "code": code_digest()}
    keys = {seed: fingerprint(**inputs, seed=seed, mask=mask.digest) for seed, mask in masks.items()}
    folders = {seed: stage.workspace.resume("train", key) for seed, key in keys.items()}
    with stage.held(fingerprint(cell=cell, keys=keys), data_digest=task.data_digest) as run:
        stage.record(metric=metric, lr=lr, data=task.summary())
        scores: list[float] = []
        for seed in stage.seeds:
            recipe = Recipe(lr=lr, seed=seed, **settings.model_dump(exclude={"batch_size"}))
            tags = {"mask_digest": masks[seed].digest}
            if not (folders[seed] / "result.json").is_file():
                with run.child(seed, tags=tags, fingerprint=keys[seed]) as child:
                    _train(stage, task, masks[seed], recipe, device, folders[seed], child)
            result = json.loads((folders[seed] / "result.json").read_text())
            for made in (DELTA, ADAPTER):
                if (folders[seed] / made).exists():
                    copy(folders[seed] / made, stage.folder(seed) / made)
            stage.record(seed, mask_bytes=files[seed].stat().st_size, mask_digest=masks[seed].digest, **result)
            if result["metric"] is not None:
                scores.append(result["metric"])
        stage.log_scores(run, metric, scores)
        stage.time(device=device.reason)
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)


def _train(stage: Stage, task: Task, mask: Mask, recipe: Recipe, device: Device, folder: Path, run: Run) -> None:
    """Train one seed and leave its delta and its result in the resume folder, the result last."""
    cell, seed = stage.cell, recipe.seed
    base_model = task.model(seed)
    outcome: dict[str, Any] = {
        "parameters": parameters_of(mask),
        "nnz": mask.nnz,
        "density": mask.nnz / parameters_of(mask),
        "dense_bytes": sum(t.numel() * t.element_size() for t in base_model.state_dict().values()),
    }
    model = trained_model(base_model, mask).to(device.device)
    base = None if model is not base_model else Base.of(model, mask)
    outcome["base_digest"] = base.digest if base else base_digest(base_model)
    try:
        result = fit_task(
            task, model, mask, recipe, stage.of_task("train").batch_size, device,
            name=f"train {cell.name} seed {seed}",
            resume=ResumeFile(folder / "state.safetensors", folder.name),
            log=run.log,
        )  # fmt: skip
    except DivergedError as error:
        outcome |= {"metric": None, "diverged": str(error), "epochs": error.history}
    else:
        outcome |= {"metric": result.history[-1][task.metric], "epochs": result.history}
        if MISMATCHED in task.sizes:
            judged = task.evaluate(model, MISMATCHED, stage.of_task("train").batch_size, autocast=device.autocast)
            outcome["mismatched"] = judged[task.metric]
        if base is None:
            outcome |= save_adapter(model, folder / ADAPTER, task.model_source)
        else:
            delta = Delta.of(model, mask, base=base, info=stage.provenance(task, seed))
            outcome |= {"delta_bytes": delta.save(folder / DELTA, base=base), "delta_digest": delta.digest}
        peak = result.peak_memory_bytes / 2**20
        stage.time(**{f"seed-{seed}": {"seconds": round(result.seconds, 3), "peak_mib": round(peak, 1)}})
        run.log(
            {"delta_bytes": outcome["delta_bytes"], "seconds": result.seconds, "peak_mib": peak}, step=result.steps
        )
    write_json(folder / "result.json", outcome)


if __name__ == "__main__":
    main("train", run, ("task", "method", "setting"))
