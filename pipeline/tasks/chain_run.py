"""One seed of a checkpoint cell: its settings in one place, its training, its chain and its result on disk."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DivergedError
from pipeline.files import write_json
from pipeline.masks.mask import Mask
from pipeline.runtime.atomic_folder import make
from pipeline.schema import CheckpointParams, ScoreParams, TrainParams
from pipeline.tasks.base import Task
from pipeline.tasks.checkpointing import Checkpoints, Masks
from pipeline.tasks.fitting import fit_task
from pipeline.tasks.probe import estimate
from pipeline.training.device import Device
from pipeline.training.recipe import Recipe
from pipeline.training.resume import ResumeFile


@dataclass(frozen=True)
class ChainPlan:
    """What all seeds of a cell have in common.

    Attributes:
        method: a method's name.
        density: chosen / all.
        head: the head's modules.
        score: how coordinates are scored.
        every: epochs between two masks; None for a fixed one.
        leak: weight decay and momentum reach every weight.
        batch_size: of training.
        recipe: the arguments of ``Recipe`` but for the seed.
    """

    method: str
    density: float
    head: Sequence[str]
    score: ScoreParams
    every: int | None
    leak: bool
    batch_size: int
    recipe: Mapping[str, Any]

    @classmethod
    def of(
        cls, method: str, setting: CheckpointParams, train: TrainParams, score: ScoreParams, *,
        density: float, head: Sequence[str], lr: float,
    ) -> "ChainPlan":  # fmt: skip
        """Put a setting's values where it has some, the task's and the method's own elsewhere.

        Returns:
            The plan.
        """
        recipe = train.model_dump(exclude={"batch_size"}) | {"lr": (setting.lr or {}).get(method, lr)}
        recipe |= {
            key: value for key in ("epochs", "weight_decay") if (value := getattr(setting, key)) is not None
        }
        if setting.examples is not None:
            score = score.model_copy(update={"examples": [setting.examples]})
        leak = setting.weight_decay_scope == "all"
        return cls(method, setting.density or density, head, score, setting.every, leak, train.batch_size, recipe)

    def summary(self) -> dict[str, Any]:
        """What a table says of the cell's settings.

        Returns:
            Plain values for JSON.
        """
        scope = "all" if self.leak else "mask"
        own = {key: self.recipe[key] for key in ("lr", "weight_decay")}
        return own | {"every": self.every, "weight_decay_scope": scope}


def train_chain(
    task: Task,
    plan: ChainPlan,
    seed: int,
    device: Device,
    folder: Path,
    *,
    name: str,
    info: Mapping[str, Any],
    log: Callable[[dict[str, float], int], None],
    to_go: int = 0,
) -> dict[str, float]:
    """Train one seed and leave ``chain/`` and ``result.json`` in its resume folder, the result last.

    Args:
        task: the data.
        plan: the cell's settings.
        seed: of the run.
        device: where, and in which precision.
        folder: the seed's resume folder.
        name: what messages call the cell.
        info: the chain's provenance.
        log: takes metrics and their step.
        to_go: where it is not 0, say first what so many seeds will cost.

    Returns:
        Seconds and peak memory; empty where training diverged.
    """
    model, file = task.model(seed).to(device.device), folder / "mask.safetensors"
    masks = Masks(task, plan.method, plan.density, plan.head, plan.score, seed, device)
    recipe = Recipe(seed=seed, **plan.recipe)
    make(folder)
    mask = Mask.load(file) if file.is_file() else masks.choose(model, 0)
    mask.save(file)
    if to_go:
        cost = estimate(masks, mask, recipe, plan.batch_size, plan.every, task.reported, leak=plan.leak)
        print(f"{name}: {recipe.epochs} epochs, seeds to go: {to_go}; {cost.text(to_go)}", file=sys.stderr)
        cost.check_room(folder, to_go)
    checkpoints = Checkpoints(folder / "chain", info, masks, mask, plan.every, task.reported, plan.batch_size)
    outcome: dict[str, Any] = {"parameters": mask.index.total, "nnz": mask.nnz, "density": mask.density}
    spent: dict[str, float] = {}
    try:
        result = fit_task(
            task, model, mask, recipe, plan.batch_size, device,
            name=f"{name} seed {seed}",
            resume=ResumeFile(folder / "state.safetensors", folder.name),
            log=log,
            after_epoch=checkpoints,
            leak=plan.leak,
        )  # fmt: skip
    except DivergedError as error:
        outcome |= {"metric": None, "diverged": str(error), "epochs": checkpoints.rows()}
    else:
        outcome |= {"metric": result.history[-1][task.metric], "epochs": checkpoints.rows()}
        outcome |= checkpoints.summary()
        spent = {"seconds": round(result.seconds, 3), "peak_mib": round(result.peak_memory_bytes / 2**20, 1)}
        log(spent | {key: outcome[key] for key in ("checkpoint_bytes", "dense_bytes")}, result.steps)
    write_json(folder / "result.json", outcome)
    return spent
