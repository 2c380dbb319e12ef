"""Train one cell on several workers that exchange only what the mask covers, once per seed.

    python -m stages.distribute digits fish main      # or: fishmask distribute --task digits --method fish

Starts its workers under torchrun on this machine; under a torchrun of your own it is one worker (see
``pipeline.distributed.launch``). Says first what it will cost, from a probe. Writes
``artifacts/distribute/<task>-<method>-<setting>/seed-N/``: ``delta.safetensors`` with all that any of the masks
touched, and ``merges.json``, each merge's bytes, drift and scores. On two CPU cores a seed of ``digits`` takes
some seconds on two workers, and their start about five. Killed at any moment and run again, it goes on from the
last merge that all workers have saved, and ends with the same bytes.
"""

import contextlib
import json
import os
import shutil
from dataclasses import replace

from pipeline.distributed.collectives import Collectives
from pipeline.distributed.launch import TIMEOUT, is_worker, joined, launch
from pipeline.errors import ParamsError
from pipeline.runtime.atomic_folder import copy
from pipeline.runtime.process import interruptible
from pipeline.schema import DistributeParams
from pipeline.tasks.base import Task
from pipeline.tasks.shared_run import FILES, sharing_of, train_shared
from pipeline.tasks.sharing import Sharing, course_of
from pipeline.training.device import Device, choose_device
from pipeline.training.fingerprint import fingerprint
from pipeline.training.recipe import Recipe
from stages.runner import Stage, main, use_threads

Plan = tuple[Task, Sharing, Recipe, int]
"""Data, how the workers share it, how each trains, the batch size of one."""


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
    known = plan(stage, wanted)  # before there are workers, each of which would say what is wrong
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
        _work(stage, *known, device, world, debug)


def plan(stage: Stage, wanted: DistributeParams) -> Plan:
    """Read what the workers will do, and check that it fits together.

    Returns:
        What every seed has in common; the recipe's own is 0.

    Raises:
        ParamsError: if it does not; names the setting.
    """
    cell, train, method = stage.cell, stage.of_task("train"), stage.cell.method or ""
    sharing = sharing_of(method, wanted, stage.of_task("score"), stage.of_task("density"), stage.of_task("head"))
    lr, metric = stage.read(f"methods.{method}.lr.{cell.task}"), stage.of_task("metric")
    settings = train.model_dump(exclude={"batch_size"}) | {"lr": (wanted.lr or {}).get(method, lr)}
    recipe = Recipe(**settings | {"epochs": wanted.epochs or train.epochs})
    task = Task.load(stage.input("fetch"), stage.of_task("model"), metric)
    stage.keep_seeds(wanted.seeds)
    try:
        course_of(sharing, recipe, train.batch_size, task.sizes["train"], wanted.workers)
    except ParamsError as error:
        raise ParamsError(f"distribute.{cell.setting}: {error}") from None
    return task, sharing, recipe, train.batch_size


def _work(
    stage: Stage, task: Task, sharing: Sharing, recipe: Recipe, batch_size: int, device: Device,
    world: Collectives, debug: bool,
) -> None:  # fmt: skip
    """Train every seed; rank 0 alone holds the cell, and talks to MLflow and to the outputs."""
    cell, metric = stage.cell, task.metric
    folders, first = stage.resumable(task.data_digest, device.reason), world.rank == 0
    names = [folder.name for folder in folders.values()]
    tags = {"data_digest": task.data_digest, "workers": str(world.size)}
    with stage.held(fingerprint(cell=cell, seeds=names), beside=True, **tags) if first else interruptible() as run:
        stage.record(kind=task.kind, metric=metric, lr=recipe.lr, data=task.summary())
        done = {s: world.largest("control", first and (f / "result.json").is_file()) for s, f in folders.items()}
        left, scores = [seed for seed in folders if not done[seed]], list[float]()
        for seed, folder in folders.items():
            if seed in left:
                child = run.child(seed, fingerprint=folder.name) if run else contextlib.nullcontext()
                with child as log:
                    spent = train_shared(
                        task, sharing, replace(recipe, seed=seed), batch_size, device, world, folder,
                        name=f"distribute {cell.name}", info=stage.provenance(task, seed),
                        log=log.log if log else None, debug=debug, to_go=len(left) if seed == left[0] else 0,
                    )  # fmt: skip
                stage.time(**{f"seed-{seed}": spent})
            if first:
                result = json.loads((folder / "result.json").read_text())
                for name in FILES if result["metric"] is not None else ():
                    copy(folder / name, stage.folder(seed) / name)
                stage.record(seed, **result)
                scores += [result["metric"]] if result["metric"] is not None else []
        if run:
            stage.log_scores(run, metric, scores)
        stage.time(device=device.reason)
    world.largest("control", 0)  # the outputs are in place: no rank needs to go on from its state any more
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main("distribute", run, ("task", "method", "setting"))
