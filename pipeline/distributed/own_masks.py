"""Masks of the workers' own: the ranking dealt out, each worker every W-th coordinate of it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipeline.errors import ParamsError
from pipeline.masks.budget import split_budget
from pipeline.masks.mask import Mask
from pipeline.masks.topk import top_coordinates
from pipeline.parameters import ParameterIndex


def interleaved(
    scores: Mapping[str, Tensor], density: float, workers: int, rank: int, always: Sequence[str] = ()
) -> Mask:
    """Choose the head and, of the W (k - head) best coordinates outside it, those ranked r, r + W, r + 2W, ...

    Every worker gets k = floor(density · n) coordinates of much the same scores, and no two share one outside the
    head. Source: the method's first implementation, distributed GLUE.

    Args:
        scores: name -> finite non-negative floats shaped like the parameter, in flat order, the same for all
            workers: Fisher scores, or ``random_scores``.
        density: chosen / all, for one worker, head included.
        workers: W.
        rank: r, of this worker, from 0.
        always: the head's module names.

    Returns:
        This worker's mask, of exactly k coordinates.

    Raises:
        ParamsError: if W masks of that density do not fit beside each other.
    """
    index = ParameterIndex({name: score.shape for name, score in scores.items()})
    head, rest = split_budget(index, density, always)
    outside = {name: score for name, score in scores.items() if name not in head}
    there = sum(score.numel() for score in outside.values())
    if rest * workers > there:
        raise ParamsError(
            f"{workers} masks of {rest} coordinates each do not fit into the {there} outside the head; "
            "lower the density, or let the workers share one mask"
        )
    best = top_coordinates(outside, rest * workers)
    flat = torch.cat([best[name] + index.offsets[name] for name in outside])
    values = torch.cat([s.detach().reshape(-1)[best[n].to(s.device)].cpu().double() for n, s in outside.items()])
    mine = flat[values.argsort(descending=True, stable=True)][rank::workers].sort().values
    chosen = {}
    for name in outside:
        start = index.offsets[name]
        low, high = torch.searchsorted(mine, torch.tensor([start, start + index.numel(name)])).tolist()
        chosen[name] = mine[low:high] - start
    return Mask.covering(index, head, chosen)


def random_scores(index: ParameterIndex, seed: int) -> dict[str, Tensor]:
    """Draw scores for random masks of the workers' own: ranked by them, every coordinate is as likely as another.

    Returns:
        Name -> fp32 scores in [0, 1) shaped like the parameter.
    """
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=draw) for name, shape in index.shapes.items()}
