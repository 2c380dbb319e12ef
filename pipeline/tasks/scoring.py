"""Fisher scores of a task's model, for the methods that choose by them: whoever draws a mask without a ranking."""

from torch import Tensor, nn

from pipeline.fisher import fisher_diagonal
from pipeline.tasks.base import Task
from pipeline.training.methods import method_named


def scores_for(
    method: str, task: Task, model: nn.Module, *,
    kind: str, power: str, examples: int, batch_size: int, seed: int, split: str = "train",
) -> dict[str, Tensor] | None:  # fmt: skip
    """Score a model's parameters on examples of a task.

    Args:
        method: its name.
        task: the data.
        model: on its device.
        kind: as in ``fisher_diagonal``.
        power: as in ``fisher_diagonal``.
        examples: how many to draw.
        batch_size: examples per batch.
        seed: of the draw.
        split: what to draw from.

    Returns:
        name -> score like the parameter; None where the method needs none.
    """
    if not method_named(method).needs_ranking:
        return None
    where = next(model.parameters()).device
    batches = task.examples(examples, batch_size, seed=seed, split=split, device=where)
    return fisher_diagonal(model, batches, kind=kind, power=power)
