"""The trained model of one seed of a cell, from what the train stage left."""

from pathlib import Path

from torch import nn

from pipeline.deltas.delta import Delta
from pipeline.errors import ArtifactError
from pipeline.tasks.adapters import FOLDER, load_adapter
from pipeline.tasks.base import Task

DELTA = "delta.safetensors"


def trained(task: Task, folder: Path, seed: int) -> nn.Module:
    """Load a base and put on it what training changed.

    Args:
        task: the base model's.
        folder: of the train stage's cell.
        seed: of the run.

    Returns:
        The model in eval mode, on the CPU; an adapter is merged into it.

    Raises:
        ArtifactError: if the cell holds nothing for that seed: it was not trained, or diverged.
    """
    own = folder / f"seed-{seed}"
    model = task.model(seed)
    if (own / DELTA).is_file():
        Delta.load(own / DELTA).apply_(model)
    elif (own / FOLDER).is_dir():
        merged: nn.Module = load_adapter(model, own / FOLDER).merge_and_unload()  # type: ignore[operator]
        return merged.eval()
    else:
        raise ArtifactError(f"{own}: holds no {DELTA} and no {FOLDER}; train the cell first, or its seed diverged")
    return model.eval()
