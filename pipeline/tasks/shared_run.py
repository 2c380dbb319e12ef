"""One seed of a distributed cell: what the workers share, from params.yaml; their training; its result on disk."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.deltas.delta import Delta
from pipeline.distributed.collectives import Collectives
from pipeline.distributed.joint_resume import JointResume
from pipeline.distributed.rounds import OnMerge
from pipeline.errors import DivergedError
from pipeline.files import write_json
from pipeline.parameters import digest_of_digests, tensor_digest
from pipeline.schema import DistributeParams, ScoreParams
from pipeline.tasks.base import Task
from pipeline.tasks.shared_probe import estimate
from pipeline.tasks.sharing import Sharing, train_worker
from pipeline.training.device import Device
from pipeline.training.methods import method_named
from pipeline.training.recipe import Recipe

FILES = ("delta.safetensors", "merges.json")
"""What a seed that did not diverge leaves beside its result."""


def sharing_of(
    method: str, setting: DistributeParams, score: ScoreParams, density: float, head: list[str]
) -> Sharing:
    """Put a setting's values where it has some, the task's own elsewhere.

    Returns:
        What the workers have in common.
    """
    score = score.variant(method_named(method).variant)
    return Sharing(
        method=method,
        density=setting.density or density,
        head=tuple(head),
        score={"examples": setting.examples or score.examples[-1], **score.how()},
        outer=(setting.outer.lr, setting.outer.momentum) if setting.outer else None,
        **setting.model_dump(include={"every", "average", "renew", "own_masks", "dtype", "warmup", "shard"}),
    )


def train_shared(
    task: Task,
    sharing: Sharing,
    recipe: Recipe,
    batch_size: int,
    device: Device,
    world: Collectives,
    folder: Path,
    *,
    name: str,
    info: Mapping[str, Any],
    log: OnMerge | None,
    debug: bool,
    to_go: int = 0,
) -> dict[str, float]:
    """Train one seed on all ranks; rank 0 leaves ``FILES`` and ``result.json`` in the folder, the result last.

    Args:
        task: the data.
        sharing: how the ranks share the work.
        recipe: how each trains, the seed included.
        batch_size: examples per batch of one worker.
        device: where, and in which precision.
        world: the ranks.
        folder: the seed's resume folder.
        name: what messages call the cell.
        info: the delta's provenance.
        log: takes the records of merges on rank 0.
        debug: check after each merge that all ranks are bitwise equal.
        to_go: where it is not 0, say first what so many seeds will cost.

    Returns:
        Seconds; empty on other ranks than 0 and where training diverged.
    """
    resume = JointResume(folder / f"rank-{world.rank}.safetensors", folder.name)
    model, first = task.model(recipe.seed).to(device.device), world.rank == 0
    if to_go:
        cost = estimate(task, sharing, recipe, batch_size, device, world.size)
        if first:
            print(f"{name}: {recipe.epochs} epochs, seeds to go: {to_go}; {cost.text(to_go)}", file=sys.stderr)
    before = {name: tensor_digest(p) for name, p in model.named_parameters()}
    outcome: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "workers": world.size}
    outcome["dense_bytes"] = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    spent: dict[str, float] = {}
    try:
        result, rounds = train_worker(
            task, model, sharing, recipe, batch_size, device, world,
            name=f"{name} seed {recipe.seed}", resume=resume, log=log, debug=debug,
        )  # fmt: skip
    except DivergedError as error:
        outcome |= {"metric": None, "diverged": str(error)}
    else:
        if first:
            mask = rounds.touched
            base = digest_of_digests(before, without=mask.whole_tensors)
            delta = Delta.of(model, mask, base=base, info=info)
            outcome |= {"delta_bytes": delta.save(folder / FILES[0]), "delta_digest": delta.digest}
            write_json(folder / FILES[1], {"merges": rounds.records, "bytes": rounds.bytes})
            outcome |= {"metric": rounds.records[-1][task.metric], "merges": rounds.records, "bytes": rounds.bytes}
            outcome |= {"steps": result.steps, "nnz": rounds.nnz, "density": rounds.nnz / mask.index.total}
            spent = {"seconds": round(result.seconds, 3)}
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "result.json", outcome)
    return spent
