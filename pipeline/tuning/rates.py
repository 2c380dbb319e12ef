"""A learning rate without asking for one: short runs on a part of train, the one with the lowest loss wins.

    a third, one and three times the usual rate of the method; then on beyond the end where the best stands, once

Each run makes about 24 steps on at most that many batches of ``fit``, and is judged by the mean loss on at most
256 rows of ``tune``, a fifth of train: never on the validation rows. The loss is less noisy than a metric of so
few rows. The head alone, on features that are computed once (``pipeline.tuning.features``), makes whole runs on
all of ``fit`` and goes on beyond the end while that gains; where it cannot, it makes four times as many steps:
after 24 a low rate still looks best, which would flatter whatever the head is compared with.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pipeline.errors import DivergedError
from pipeline.files import write_json
from pipeline.masks.mask import Mask
from pipeline.tasks.base import Task
from pipeline.tasks.draws import permutation
from pipeline.tasks.fitting import fit_task
from pipeline.training.device import Device
from pipeline.training.recipe import Recipe
from pipeline.tuning.features import HeadTask
from pipeline.tuning.recorded import recorded

USUAL = {"head": 1e-2, "dense": 1e-4, "fish": 2e-3}
"""Where a search starts."""
FIT, TUNE = "short-fit", "short-tune"
STEPS, HEAD_STEPS, TUNE_ROWS = 24, 96, 256
TRIES, HEAD_TRIES = 4, 8
FEWEST = 100
"""Rows of train below which a search would be noise: the usual rates are taken."""


def search(
    task: Task,
    method: str,
    mask_of: Callable[[], Mask],
    recipe: Recipe,
    batch_size: int,
    device: Device,
    folder: Path,
) -> tuple[float, dict[float, float]]:
    """Search one method's rate.

    Args:
        task: the data; of the head alone perhaps a ``HeadTask``.
        method: its name.
        mask_of: chooses its mask.
        recipe: of the real run; its rate is replaced, and its epochs but for a ``HeadTask``.
        batch_size: examples per step.
        device: where.
        folder: keeps what was tried, so that a resumed search goes on.

    Returns:
        The best rate, and rate -> loss of all that were tried (infinite where training diverged).
    """
    usual, whole = USUAL[method], isinstance(task, HeadTask)
    if len(task.rows("train")) < FEWEST:
        return usual, {}
    steps = HEAD_STEPS if method == "head" else STEPS
    for name, split, most in ((FIT, "fit", steps * batch_size), (TUNE, "tune", TUNE_ROWS)):
        rows = task.rows(split)
        task.name_part(name, rows if whole else rows[permutation(len(rows), recipe.seed, 7)[:most]])
    if not whole:
        recipe = replace(recipe, epochs=math.ceil(steps / math.ceil(len(task.rows(FIT)) / batch_size)))
    file = folder / f"rates-{method}.json"
    tried: dict[float, float] = {float(rate): loss for rate, loss in recorded(file, {}).items()}
    mask: Mask | None = None
    while (rate := next_rate(tried, usual, HEAD_TRIES if whole else TRIES)) is not None:
        mask = mask or mask_of()
        tried[rate] = _loss(task, method, mask, replace(recipe, lr=rate), batch_size, device)
        write_json(file, {f"{r:g}": (loss if math.isfinite(loss) else 1e9) for r, loss in tried.items()})
    return min(sorted(tried), key=lambda rate: tried[rate]), tried


def next_rate(tried: dict[float, float], usual: float, tries: int = TRIES) -> float | None:
    """Choose the next rate: the usual one and its neighbours, then beyond the end where the best stands.

    Args:
        tried: rate -> loss.
        usual: where to begin.
        tries: rates at most.

    Returns:
        The rate; None when the search is over.
    """
    for rate in (usual, neighbour(usual, 1), neighbour(usual, -1)):
        if rate not in tried:
            return rate
    best = min(sorted(tried), key=lambda rate: tried[rate])
    if len(tried) >= tries or min(tried) < best < max(tried):
        return None
    return neighbour(best, 1 if best == max(tried) else -1)


def neighbour(rate: float, move: int) -> float:
    """Three times the rate or a third of it, to one digit."""
    return float(f"{rate * 3.0**move:.0e}")


def _loss(task: Task, method: str, mask: Mask, recipe: Recipe, batch_size: int, device: Device) -> float:
    model = task.model(recipe.seed).to(device.device)
    try:
        result = fit_task(
            task,
            model,
            mask,
            recipe,
            batch_size,
            device,
            name=f"{method}: trying rate {recipe.lr:g}",
            splits=(FIT, TUNE),
        )
    except DivergedError:
        return math.inf
    return result.history[-1]["loss"]
