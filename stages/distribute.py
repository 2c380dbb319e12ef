"""Train one cell on several workers that exchange only what the mask covers, once per seed.

    python -m stages.distribute digits fish main      # or: fishmask distribute --task digits --method fish

Starts its workers under torchrun on this machine; under a torchrun of your own it is one worker (see
``pipeline.distributed.launch``). Writes ``artifacts/distribute/<task>-<method>-<setting>/seed-N/``:
``delta.safetensors`` with all that any of the masks touched, and ``merges.json``, each merge's bytes, drift and
scores. On two CPU cores a seed of ``digits`` takes some seconds on two workers, and their start about five. Killed
at any moment and run again, it goes on from the last merge that all workers have saved, and ends with the same
bytes.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from pipeline.deltas.delta import Delta
from pipeline.distributed.collectives import Collectives
from pipeline.distributed.joint_resume import JointResume
from pipeline.distributed.launch import TIMEOUT, is_worker, joined, launch
from pipeline.errors import DivergedError, ParamsError
from pipeline.files import write_json
from pipeline.parameters import digest_of_digests, tensor_digest
from pipeline.process import interruptible
from pipeline.tasks.base import Task
from pipeline.tasks.sharing import Sharing, train_worker
from pipeline.tracking import Run
from pipeline.training.device import Device, choose_device
from pipeline.training.methods import method_named
from pipeline.training.recipe import Recipe
from pipeline.training.resume import fingerprint
from pipeline.workspace import code_digest
from stages.runner import Stage, main, use_threads


def run(stage: Stage, *, timeout: float = TIMEOUT, restarts: int = 0, debug: bool = False) -> None:
    """Start the workers, or be one.

    Args:
        stage: its cell's setting is a name below ``distribute`` in params.yaml.
        timeout: seconds that an exchange between workers may take.
        restarts: how often the workers are started again after one failed.
        debug: check after each merge that all ranks are bitwise equal.

    Raises:
        ParamsError: if a torchrun of your own started another number of workers.
    """
    wanted, threads = stage.read(f"distribute.{stage.cell.setting}"), stage.read("threads")
    if not is_worker():
        launch(wanted.workers, restarts=restarts, threads=threads)
        return
    use_threads(max(1, threads // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    device = choose_device(stage.read("device"), stage.read("precision"))
    with joined(timeout, cuda=device.device.type == "cuda") as world:
        if world.size != wanted.workers:
            raise ParamsError(
                f"distribute.{stage.cell.setting}.workers is {wanted.workers}, but torchrun started {world.size}; "
                "make them equal"
            )
        _work(stage, wanted, device, world, debug)


def _work(stage: Stage, wanted: Any, device: Device, world: Collectives, debug: bool) -> None:
    """Train every seed; rank 0 alone holds the cell, and talks to MLflow and to the outputs."""
    cell, train = stage.cell, stage.of_task("train")
    score = stage.of_task("score").variant(method_named(cell.method or "").variant)
    density, metric = stage.of_task("density"), stage.of_task("metric")
    lr = stage.read(f"methods.{cell.method}.lr.{cell.task}")
    task = Task.load(stage.input("fetch"), stage.of_task("model"), metric)
    sharing = Sharing(
        method=cell.method or "",
        density=wanted.density or density,
        head=tuple(stage.of_task("head")),
        score={"examples": wanted.examples or score.examples[-1], **score.how()},
        outer=(wanted.outer.lr, wanted.outer.momentum) if wanted.outer else None,
        **wanted.model_dump(include={"every", "average", "renew", "own_masks", "dtype", "warmup", "shard"}),
    )
    recipe = train.model_dump(exclude={"batch_size"}) | ({"epochs": wanted.epochs} if wanted.epochs else {})
    recipe["lr"] = (wanted.lr or {}).get(cell.method, lr)
    inputs = {"settings": stage.settings, "data": task.data_digest, "device": device.reason, "code": code_digest()}
    keys = {seed: fingerprint(**inputs, seed=seed) for seed in stage.seeds}
    folders = {seed: stage.workspace.resume("distribute", key) for seed, key in keys.items()}
    first = world.rank == 0
    tags = {"data_digest": task.data_digest, "workers": str(world.size)}
    with stage.held(fingerprint(cell=cell, keys=keys), **tags) if first else interruptible() as run:
        stage.record(kind=task.kind, metric=metric, lr=recipe["lr"], data=task.summary())
        scores: list[float] = []
        for seed in stage.seeds:
            resume = JointResume(folders[seed] / f"rank-{world.rank}.safetensors", keys[seed])
            if not world.largest("control", first and (folders[seed] / "result.json").is_file()):
                child = run.child(seed, fingerprint=keys[seed]) if run else contextlib.nullcontext()
                with child as log:
                    _train(stage, task, sharing, Recipe(seed=seed, **recipe), device, world, resume, log, debug)
            if first:
                result = json.loads((folders[seed] / "result.json").read_text())
                for name in ("delta.safetensors", "merges.json"):
                    with contextlib.suppress(FileNotFoundError):
                        shutil.copyfile(folders[seed] / name, stage.folder(seed) / name)
                stage.record(seed, **result)
                scores += [result["metric"]] if result["metric"] is not None else []
        if run:
            stage.log_scores(run, metric, scores)
        stage.time(device=device.reason)
    world.largest("control", 0)  # the outputs are in place: no rank needs to go on from its state any more
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)


def _train(
    stage: Stage, task: Task, sharing: Sharing, recipe: Recipe, device: Device, world: Collectives,
    resume: JointResume, run: Run | None, debug: bool,
) -> None:  # fmt: skip
    """Train one seed; rank 0 leaves the delta, the merges and the result in the resume folder, the result last."""
    cell, seed, folder = stage.cell, recipe.seed, Path(resume.path).parent
    model = task.model(seed).to(device.device)
    before = {name: tensor_digest(p) for name, p in model.named_parameters()}
    outcome: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "workers": world.size}
    outcome["dense_bytes"] = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    try:
        result, rounds = train_worker(
            task, model, sharing, recipe, stage.of_task("train").batch_size, device, world,
            name=f"distribute {cell.name} seed {seed}", resume=resume, log=run.log if run else None, debug=debug,
        )  # fmt: skip
    except DivergedError as error:
        outcome |= {"metric": None, "diverged": str(error)}
    else:
        if world.rank == 0:
            mask = rounds.touched
            base = digest_of_digests(before, without=mask.whole_tensors)
            delta = Delta.of(model, mask, base=base, info=stage.provenance(task, seed))
            outcome |= {"delta_bytes": delta.save(folder / "delta.safetensors"), "delta_digest": delta.digest}
            write_json(folder / "merges.json", {"merges": rounds.records, "bytes": rounds.bytes})
            outcome |= {"metric": rounds.records[-1][task.metric], "merges": rounds.records, "bytes": rounds.bytes}
            outcome |= {"steps": result.steps, "nnz": rounds.nnz, "density": rounds.nnz / mask.index.total}
            stage.time(**{f"seed-{seed}": {"seconds": round(result.seconds, 3)}})
    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "result.json", outcome)


if __name__ == "__main__":
    main("distribute", run, ("task", "method", "setting"))
