"""Train one model on one task through a mask: what the stages that train and the search of rates share."""

from collections.abc import Callable

from torch import nn

from pipeline.masks.mask import Mask
from pipeline.runtime.progress import ProgressLine
from pipeline.tasks.base import Task
from pipeline.training.device import Device
from pipeline.training.leak import LeakyParameters
from pipeline.training.loop import AfterEpoch, FitResult, Progress, fit
from pipeline.training.masked import MaskedParameters
from pipeline.training.memory import in_pieces_that_fit
from pipeline.training.recipe import Recipe
from pipeline.training.resume import ResumeFile

EVALUATION = 4
"""Evaluation batches are this many times larger than those of training: no gradients, hence no memory for them."""


def fit_task(
    task: Task,
    model: nn.Module,
    mask: Mask,
    recipe: Recipe,
    batch_size: int,
    device: Device,
    *,
    name: str,
    splits: tuple[str, str] | None = None,
    resume: ResumeFile | None = None,
    log: Callable[[dict[str, float], int], None] | None = None,
    after_epoch: AfterEpoch | None = None,
    leak: bool = False,
) -> FitResult:
    """Train ``model``, in place, on the masked coordinates.

    Args:
        task: the data and the metric.
        model: the base, on the device.
        mask: the coordinates to train.
        recipe: how; its seed also orders the data.
        batch_size: examples per batch.
        device: where, and in which precision.
        name: what the progress display calls it.
        splits: trained and evaluated; by default train and the reported split.
        resume: where an unfinished run is kept.
        log: takes metrics and their step.
        after_epoch: looks on after each epoch, and may change the mask (see ``fit``).
        leak: let weight decay and momentum reach the frozen values (``pipeline.training.leak``).

    Returns:
        The history, one entry per epoch, with the task's metrics; and the cost.
    """
    trained, judged = splits or ("train", task.reported)
    where = device.device
    kind = LeakyParameters if leak else MaskedParameters
    last: dict[str, float] = {}
    size = EVALUATION * batch_size

    def judge(model: nn.Module) -> dict[str, float]:
        nonlocal size
        scores, size = in_pieces_that_fit(
            lambda most: task.evaluate(model, judged, most, where, device.autocast), size, "evaluation batches",
            line.say,
        )  # fmt: skip
        last.update(scores)
        return scores

    def note(progress: Progress) -> str:
        loss = [] if progress.loss is None else [f"loss {progress.loss:.3f}"]
        return ", ".join([*loss, *([f"{task.metric} {last[task.metric]:.3f}"] if last else [])])

    with ProgressLine(name) as line, kind(model, mask) as masked:
        return fit(
            model,
            lambda epoch: task.batches(trained, batch_size, seed=recipe.seed, epoch=epoch, device=where),
            masked=masked,
            recipe=recipe,
            evaluate=judge,
            device=device,
            channels_last=task.kind == "image" and where.type == "cuda",
            resume=resume,
            log=log,
            progress=lambda p: line.update(p.step, p.steps, note(p)),
            after_epoch=after_epoch,
            say=line.say,
        )
