"""Train one cell: only the coordinates of its mask, once per seed.

    python -m stages.train words fish main        # or: fishmask train --task words --method fish

Writes ``artifacts/train/<task>-<method>-<setting>/seed-N/delta.safetensors``: mask, trained values and buffers. On two
CPU cores a seed takes 5-15 s on ``words`` and about as long on ``digits``. Killed at any moment and run again, it ends
with the same bytes: an unfinished run is continued from ``.resume/``, a finished seed is taken from there.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from pipeline.deltas.delta import Delta
from pipeline.files import write_json
from pipeline.tasks.base import Task
from pipeline.tracking import Run
from pipeline.training.device import Device, choose_device
from pipeline.training.loop import Recipe, fit
from pipeline.training.masked import MaskedParameters
from pipeline.training.resume import ResumeFile, fingerprint

from pipeline.masks.mask import Mask
from pipeline.parameters import base_digest
from pipeline.progress import ProgressLine
from pipeline.workspace import VERSION, code_digest
from stages.runner import Stage, main, use_threads


def run(stage: Stage) -> None:
    """Train ``stage.cell`` for every seed."""
    cell = stage.cell
    settings, metric = stage.of_task("train"), stage.of_task("metric")
    lr = stage.read(f"methods.{cell.method}.lr.{cell.task}")
    use_threads(stage.read("threads"))
    device = choose_device(stage.read("device"), stage.read("precision"))
    task = Task.load(stage.input("fetch"), stage.of_task("model"), metric)
    masks = {s: stage.input("mask", cell.method, cell.setting) / f"seed-{s}/mask.safetensors" for s in stage.seeds}
    recipe = {"lr": lr, **settings.model_dump(exclude={"batch_size"})}
    digests = {seed: Mask.load(path).digest for seed, path in masks.items()}
    with stage.held(fingerprint(cell=cell, settings=stage.settings, masks=digests, data=task.data_digest)) as run:
        stage.record(metric=metric, lr=lr, data=task.summary())
        finished = []
        for seed in stage.seeds:
            key = fingerprint(
                settings=stage.settings, seed=seed, mask=digests[seed], data=task.data_digest,
                device=device.reason, code=code_digest(),
            )  # fmt: skip
            folder = stage.workspace.resume("train", key)
            done = folder / "result.json"
            if not done.is_file():
                with run.child(
                    f"seed-{seed}", tags={"seed": seed, "mask_digest": digests[seed]}, fingerprint=key
                ) as child:
                    train(stage, task, Mask.load(masks[seed]), Recipe(seed=seed, **recipe), device, folder, child)
            result = json.loads(done.read_text())
            shutil.copyfile(folder / "delta.safetensors", stage.folder(seed) / "delta.safetensors")
            stage.record(seed, mask_bytes=masks[seed].stat().st_size, **result)
            finished.append(folder)
        stage.time(device=device.reason)
    for folder in finished:
        shutil.rmtree(folder, ignore_errors=True)


def train(
    stage: Stage, task: Task, mask: Mask, recipe: Recipe, device: Device, folder: Path, run: Run
) -> dict[str, Any]:
    """Train one seed and leave ``delta.safetensors`` and ``result.json`` in the resume folder."""
    seed, size = recipe.seed, stage.of_task("train").batch_size
    model = task.model(seed).to(device.device)
    base = base_digest(model, without=[name for name in mask.index if mask.whole(name)])
    dense_bytes = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    with ProgressLine(f"train {stage.cell.name} seed {seed}") as line, MaskedParameters(model, mask) as masked:
        result = fit(
            model,
            lambda epoch: task.batches("train", size, seed=seed, epoch=epoch),
            masked=masked,
            recipe=recipe,
            evaluate=lambda m: task.evaluate(
                m, "validation", 4 * size, device=device.device, autocast=device.autocast
            ),
            device=device.device,
            autocast=device.autocast,
            resume=ResumeFile(folder / "state.safetensors", folder.name),
            log=run.log,
            progress=lambda p: line.update(p.step, p.steps, f"loss {p.loss:.3f}"),
        )
    info = {"task": stage.cell.task, "method": stage.cell.method, "setting": stage.cell.setting, "seed": seed,
            "data": task.data_digest, "model": task.model_source, "fishmask": VERSION}  # fmt: skip
    delta = Delta.of(model, mask, base=base, info=info)
    size = delta.save(folder / "delta.safetensors")
    outcome = {
        "metric": result.history[-1][task.metric], "epochs": result.history, "nnz": mask.nnz, "density": mask.density,
        "parameters": mask.index.total, "delta_bytes": size, "dense_bytes": dense_bytes,
        "mask_digest": mask.digest, "delta_digest": delta.digest, "base_digest": base,
    }  # fmt: skip
    stage.time(**{f"seed-{seed}": {"seconds": result.seconds, "peak_bytes": result.peak_memory_bytes}})
    run.log({"delta_bytes": float(size), "seconds": result.seconds}, step=result.steps)
    write_json(folder / "result.json", outcome)
    return outcome


if __name__ == "__main__":
    main("train", run, ("task", "method", "setting"))
