"""Selections: how scores of different layers are made comparable before the largest are chosen.

Each is a transform of the scores, most of them one that keeps the order within a group of tensors, so that one
ranking of the transformed scores still gives the mask of every density, nested and exactly k::

    mask = Mask.top_k(selected(scores, "per-layer", exclude=["bert.pooler"]), density=0.005, always=["classifier"])

``global`` is the paper's: scores as they are.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pipeline.errors import ParamsError, unknown
from pipeline.parameters import ParameterIndex

Group = Callable[[str], str]


def layer_of(name: str) -> str:
    """Name the layer of a tensor: up to its name's first number (``bert.encoder.layer.3``), else two parts.

    Returns:
        The layer, such as ``bert.embeddings``; the name itself where it has a single part.
    """
    parts = name.split(".")[:-1] or [name]
    number = next((i for i, part in enumerate(parts) if part.isdigit()), 1)
    return ".".join(parts[: number + 1])


def selected(
    scores: Mapping[str, Tensor], selection: str = "global", exclude: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Transform scores so that the largest over all tensors are those that a selection chooses.

    Args:
        scores: name -> non-negative scores shaped like the parameter, in flat order.
        selection: a key of ``SELECTIONS``.
        exclude: modules whose coordinates are no candidates: their scores become 0.

    Returns:
        name -> fp32 or fp64 scores of the same shape; the given ones where nothing had to change.

    Raises:
        ParamsError: if there is no such selection, or nothing is left to choose from.
        MismatchError: if a module name in ``exclude`` matches nothing.
    """  # noqa: DOC502 - raised by what it calls
    if selection not in SELECTIONS:
        raise ParamsError(f"unknown selection {unknown(selection, SELECTIONS)}")
    index = ParameterIndex({name: score.shape for name, score in scores.items()})
    away = set(index.within(exclude))
    if len(away) == len(index) > 0:
        raise ParamsError(f"exclude ({', '.join(exclude)}) leaves no parameter to choose")
    kept = {name: score for name, score in scores.items() if name not in away}
    kept = SELECTIONS[selection](kept)
    return {name: kept[name] if name in kept else torch.zeros_like(score) for name, score in scores.items()}


def shares(scores: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
    """Give every group of tensors the same share of its own coordinates: s -> m / rank(s).

    The r-th largest of a group's m scores becomes m / r, so that the top fraction d of every group is above 1 / d.
    Among equal scores the lower coordinate ranks first; zeros stay zeros, so that a coordinate that has no
    information is never chosen before one that has.

    Returns:
        name -> fp32 scores.
    """
    out: dict[str, Tensor] = {}
    for names in _grouped(scores, group).values():
        flat = torch.cat([scores[name].detach().reshape(-1) for name in names])
        order = torch.sort(flat, descending=True, stable=True).indices
        value = torch.empty(flat.numel(), dtype=torch.float32, device=flat.device)
        value[order] = flat.numel() / torch.arange(1, flat.numel() + 1, dtype=torch.float32, device=flat.device)
        value[flat == 0] = 0.0
        parts = value.split([scores[name].numel() for name in names])
        out |= {name: part.reshape(scores[name].shape) for name, part in zip(names, parts, strict=True)}
    return out


def normalised(scores: Mapping[str, Tensor], group: Group, power: float) -> dict[str, Tensor]:
    """Divide by the mean score of the group to some power: s -> s / mean(group)^power.

    Power 1 makes groups comparable whatever their level; 1/2 goes half the way.

    Returns:
        name -> fp32 scores, fp64 where they were.
    """
    out: dict[str, Tensor] = {}
    for names in _grouped(scores, group).values():
        total = sum(float(scores[name].sum(dtype=torch.float64)) for name in names)
        mean = total / max(1, sum(scores[name].numel() for name in names))
        factor = mean**-power if mean > 0 else 0.0
        out |= {name: scores[name] * factor for name in names}
    return out


def sampled(scores: Mapping[str, Tensor], power: float) -> dict[str, Tensor]:
    """Draw coordinates with odds s^power: s -> s^power / e, e ~ Exp(1) of each coordinate's own.

    The largest k of these are k draws without replacement (Efraimidis and Spirakis, "Weighted random sampling with
    a reservoir", 2006). Power 0 is a random mask of what has information at all; the larger the power, the nearer
    to the largest scores. Between them lies what neither has: informed, and spread over rows, columns and layers.
    A tensor's draw follows from its name.

    Returns:
        name -> fp32 scores; zeros stay zeros.
    """
    out: dict[str, Tensor] = {}
    for name, score in scores.items():
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest())
        e = torch.empty(score.shape).exponential_(generator=torch.Generator().manual_seed(seed))
        out[name] = (score.detach() ** power).float() / e.to(score.device)
    return out


def _grouped(scores: Mapping[str, Tensor], group: Group) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in scores:
        groups.setdefault(group(name), []).append(name)
    return groups


SELECTIONS: dict[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {
    "global": dict,
    "per-layer": lambda scores: shares(scores, layer_of),
    "per-tensor": lambda scores: shares(scores, str),
    "layer-mean": lambda scores: normalised(scores, layer_of, 1.0),
    "tensor-mean": lambda scores: normalised(scores, str, 1.0),
    "tensor-root": lambda scores: normalised(scores, str, 0.5),
    "sampled": lambda scores: sampled(scores, 0.25),
}
