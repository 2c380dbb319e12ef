"""The strategies: which coordinates a method trains. In all of them the head is chosen and inside the budget.

Each function stands for one strategy; ``STRATEGIES`` maps its name to a call of one form, for code that takes the
name from params.yaml::

    mask = STRATEGIES["random"](model, density=0.005, always=["classifier"], seed=0)
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import ParamsError
from pipeline.masks.budget import split_budget
from pipeline.masks.mask import Mask
from pipeline.masks.ranking import Ranking
from pipeline.masks.topk import top_coordinates
from pipeline.parameters import ParameterIndex, unwrapped


def fisher(scores: Ranking | Mapping[str, Tensor], density: float, always: Sequence[str] = ()) -> Mask:
    """Choose the k - head coordinates of the largest score outside the head, and the head.

    Source: "Training Neural Networks with Fixed Sparse Masks", section 3; FISH Mask.

    Args:
        scores: Fisher scores shaped like the parameters, or a ranking of them.
        density: chosen / all, head included.
        always: the head's module names.

    Returns:
        The mask, of exactly k = floor(density · n) coordinates.
    """
    return scores.cut(density, always) if isinstance(scores, Ranking) else Mask.top_k(scores, density, always)


def random(index: ParameterIndex, density: float, seed: int, always: Sequence[str] = ()) -> Mask:
    """Choose k - head coordinates outside the head, every such set with equal probability, and the head.

    The draw depends on the seed, the sizes and the names alone: not on the device, nor on the tensors' order.

    Returns:
        The mask, of exactly k = floor(density · n) coordinates.
    """
    head, rest = split_budget(index, density, always)
    names = sorted(set(index) - set(head))
    bounds = list(accumulate((index.numel(name) for name in names), initial=0))
    flat = _draw(rest, bounds[-1], torch.Generator().manual_seed(seed))
    cuts = np.searchsorted(flat, bounds).tolist()
    chosen = {n: torch.from_numpy(flat[cuts[i] : cuts[i + 1]] - bounds[i]) for i, n in enumerate(names)}
    return Mask.covering(index, head, chosen)


def _draw(count: int, total: int, generator: torch.Generator) -> np.ndarray:
    """Draw ``count`` of 0..total-1 without replacement, sorted, in memory of the order of ``count``.

    The first distinct values of independent uniform draws are a uniform set; above one half its complement is
    drawn, so that few draws repeat.

    Returns:
        int64 [count], increasing.
    """
    if 2 * count > total:
        return np.delete(np.arange(total), _draw(total - count, total, generator))
    drawn = np.empty(0, dtype=np.int64)
    while len(drawn) < count:
        more = torch.randint(total, (count - len(drawn) + 64,), generator=generator).numpy()
        values, first = np.unique(np.concatenate([drawn, more]), return_index=True)
        drawn = values[np.argsort(first)]  # distinct, in the order they were drawn
    return np.sort(drawn[:count])


def magnitude(model: nn.Module, density: float, always: Sequence[str] = ()) -> Mask:
    """Choose the k - head coordinates of the largest |w| outside the head, and the head.

    Returns:
        The mask, of exactly k = floor(density · n) coordinates.
    """
    index = ParameterIndex.of(model)
    head, rest = split_budget(index, density, always)
    weights = {name: p for name, p in unwrapped(model).named_parameters() if name in index and name not in head}
    return Mask.covering(index, head, top_coordinates(weights, rest, absolute=True))


def bias(index: ParameterIndex, always: Sequence[str] = ()) -> Mask:
    """Choose every parameter named ``bias``, and the head; the density is what that makes it (BitFit).

    Returns:
        The mask.

    Raises:
        ParamsError: if the network has no bias and no head is named.
    """
    chosen = {name for name in index if name.rpartition(".")[2] == "bias"} | set(index.within(always))
    if not chosen:
        raise ParamsError("the network has no parameter named 'bias' and no head is named: nothing is chosen")
    return Mask.covering(index, [name for name in index if name in chosen])


def dense(index: ParameterIndex) -> Mask:
    """Choose every parameter: ordinary fine-tuning.

    Returns:
        The mask, of density 1.
    """
    return Mask.covering(index, list(index))


def head(index: ParameterIndex, always: Sequence[str]) -> Mask:
    """Choose the head alone.

    Returns:
        The mask.

    Raises:
        ParamsError: if no head is named.
    """
    if not always:
        raise ParamsError("no head is named: name its modules, such as 'classifier'")
    return Mask.covering(index, index.within(always))


class Strategy(Protocol):
    """One form for all strategies; each takes of the arguments what it needs."""

    def __call__(
        self,
        model: nn.Module,
        *,
        density: float,
        always: Sequence[str] = (),
        seed: int = 0,
        ranking: Ranking | Mapping[str, Tensor] | None = None,
    ) -> Mask:
        """Choose the coordinates of ``model``; ``ranking`` is needed by ``fisher`` alone."""
        ...


def _fisher(
    model: nn.Module,
    *,
    density: float,
    always: Sequence[str] = (),
    seed: int = 0,
    ranking: Ranking | Mapping[str, Tensor] | None = None,
) -> Mask:
    if ranking is None:
        raise ParamsError("the strategy 'fisher' needs scores or a ranking of them; run the score stage first")
    return fisher(ranking, density, always)


STRATEGIES: dict[str, Strategy] = {
    "fisher": _fisher,
    "random": lambda model, *, density, always=(), seed=0, ranking=None: random(
        ParameterIndex.of(model), density, seed, always
    ),
    "magnitude": lambda model, *, density, always=(), seed=0, ranking=None: magnitude(model, density, always),
    "bias": lambda model, *, density, always=(), seed=0, ranking=None: bias(ParameterIndex.of(model), always),
    "dense": lambda model, *, density, always=(), seed=0, ranking=None: dense(ParameterIndex.of(model)),
    "head": lambda model, *, density, always=(), seed=0, ranking=None: head(ParameterIndex.of(model), always),
}
