"""Fisher scores of a task's model, for the methods that choose by them: whoever draws a mask without a ranking.

A freshly drawn head sends the gradient of one random function of the features into the network: near zero logits
every example's gradient is +-1/2 of it, whatever its label. Averaging over ``heads`` takes that chance out;
``warm_head`` trains the head a little first, so that the scores are those of the task.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline.fisher import fisher_diagonal
from pipeline.masks.select import head as head_mask
from pipeline.masks.selection import selected
from pipeline.parameters import ParameterIndex
from pipeline.tasks.base import Task
from pipeline.tasks.batches import Batches
from pipeline.training.generators import undisturbed
from pipeline.training.loop import fit
from pipeline.training.masked import MaskedParameters
from pipeline.training.memory import Say, in_pieces_that_fit
from pipeline.training.methods import method_named
from pipeline.training.recipe import Recipe

_NEXT_HEAD = 7_919  # between the seeds of one run's heads, so that runs of neighbouring seeds share none
_WARM_LR = 0.01  # for AdamW on the head alone, where it matters little


def scores_for(
    method: str, task: Task, model: nn.Module, *,
    kind: str, power: str, examples: int, batch_size: int, seed: int, split: str = "train", say: Say | None = None,
    selection: str = "global", exclude: Sequence[str] = (), heads: int = 1, warm_head: int = 0,
    head: Sequence[str] = (),
) -> dict[str, Tensor] | None:  # fmt: skip
    """Score a model's parameters on examples of a task, comparable as the selection asks.

    Args:
        method: its name.
        task: the data.
        model: on its device.
        kind: as in ``fisher_diagonal``.
        power: as in ``fisher_diagonal``.
        examples: how many to draw.
        batch_size: examples per batch.
        seed: of the draw, and of further heads.
        split: what to draw from.
        say: takes a sentence where batches had to be smaller; scores do not depend on that.
        selection: as in ``pipeline.masks.selection``.
        exclude: likewise.
        heads: as in ``raw_scores``.
        warm_head: likewise.
        head: the head's module names.

    Returns:
        name -> score like the parameter; None where the method needs none.
    """
    if not method_named(method).needs_ranking:
        return None
    where = next(model.parameters()).device

    def score(size: int) -> dict[str, Tensor]:
        batches = task.examples(examples, size, seed=seed, split=split, device=where)
        return raw_scores(
            task, model, batches, kind=kind, power=power, seed=seed, heads=heads, warm_head=warm_head, head=head
        )

    scores, _ = in_pieces_that_fit(score, batch_size, "scoring batches", say)
    return selected(scores, selection, exclude)


def raw_scores(
    task: Task, model: nn.Module, batches: Batches, *,
    kind: str, power: str, seed: int, heads: int = 1, warm_head: int = 0, head: Sequence[str] = (),
) -> dict[str, Tensor]:  # fmt: skip
    """Average the Fisher diagonal over heads: (1/H) sum_h F(theta with head h), exact for each.

    Args:
        task: draws further heads, as it draws the first.
        model: on its device, its head as it was drawn; left as it was.
        batches: the examples.
        kind: as in ``fisher_diagonal``.
        power: likewise.
        seed: of the model's own head; the others follow from it.
        heads: how many heads, the model's own among them.
        warm_head: passes over the examples that train each head alone before it is scored with.
        head: the head's module names, needed where it is warmed.

    Returns:
        name -> score like the parameter.
    """
    scores: dict[str, Tensor] = {}
    where = next(model.parameters()).device
    for number in range(heads):
        own = model if number == 0 else task.model(seed + number * _NEXT_HEAD).to(where)
        with _warmed(own, batches, warm_head, head, seed):
            part = fisher_diagonal(own, batches, kind=kind, power=power)
        scores = {n: s.lerp_(part[n], 1 / (number + 1)) for n, s in scores.items()} if number else part
    return scores


@contextmanager
def _warmed(model: nn.Module, batches: Batches, passes: int, head: Sequence[str], seed: int) -> Iterator[None]:
    """Train the head alone for some passes; afterwards it is as it was."""
    if not passes:
        yield
        return
    mask = head_mask(ParameterIndex.of(model), head)
    where = next(model.parameters()).device
    with MaskedParameters(model, mask) as masked:
        drawn = masked.values.detach().clone()
        try:
            with undisturbed(model, where):
                fit(model, lambda _: batches, masked=masked, recipe=Recipe(epochs=passes, lr=_WARM_LR, seed=seed))
            model.eval()
            with masked.suspended():
                yield
        finally:
            with torch.no_grad():
                masked.values.copy_(drawn)
            masked.write_()
