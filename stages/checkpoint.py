"""Train one cell of Table 4: every epoch's checkpoint is a step of a chain, counted, restored and scored.

    python -m stages.checkpoint digits fish fixed-2e-2    # or: fishmask checkpoint run --task digits ...

Writes ``artifacts/checkpoint/<task>-<method>-<setting>/seed-N/``: the chain, as ``fishmask checkpoint`` reads it.
Says first what it will cost, from a probe. A seed of ``digits`` takes seconds on two CPU cores. Killed at any
moment and run again, it ends with the same bytes: run and chain are continued from ``.resume/``.
"""

import json
import shutil

from pipeline.runtime.atomic_folder import copy
from pipeline.tasks.base import Task
from pipeline.tasks.chain_run import ChainPlan, train_chain
from pipeline.training.device import choose_device
from pipeline.training.fingerprint import fingerprint
from stages.runner import Stage, main, use_threads


def run(stage: Stage) -> None:
    """Train ``stage.cell`` for every seed."""
    cell, method = stage.cell, stage.cell.method or ""
    setting, train, score = (
        stage.read(f"checkpoints.{cell.setting}"), stage.of_task("train"), stage.of_task("score")
    )  # fmt: skip
    lr = stage.read(f"methods.{method}.lr.{cell.task}")
    density, head = stage.of_task("density"), stage.of_task("head")
    plan = ChainPlan.of(method, setting, train, score, density=density, head=head, lr=lr)
    use_threads(stage.read("threads"))
    device, metric = choose_device(stage.read("device"), stage.read("precision")), stage.of_task("metric")
    task = Task.load(stage.input("fetch"), stage.of_task("model"), metric)
    folders = stage.resumable(task.data_digest, device.reason)
    names = [folder.name for folder in folders.values()]
    with stage.held(fingerprint(cell=cell, seeds=names), data_digest=task.data_digest) as run:
        stage.record(metric=metric, data=task.summary(), **plan.summary())
        left = [seed for seed, folder in folders.items() if not (folder / "result.json").is_file()]
        scores: list[float] = []
        for seed, folder in folders.items():
            if seed in left:
                with run.child(seed, fingerprint=folder.name) as child:
                    spent = train_chain(
                        task, plan, seed, device, folder, name=f"checkpoint {cell.name}",
                        info=stage.provenance(task, seed), log=child.log,
                        to_go=len(left) if seed == left[0] else 0,
                    )  # fmt: skip
                stage.time(**{f"seed-{seed}": spent})
            result = json.loads((folder / "result.json").read_text())
            if result["metric"] is not None:
                copy(folder / "chain", stage.folder(seed))
                scores.append(result["metric"])
            stage.record(seed, **result)
        stage.log_scores(run, metric, scores)
        stage.time(device=device.reason)
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main("checkpoint", run, ("task", "method", "setting"))
