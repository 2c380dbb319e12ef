"""A delta as a PEFT adapter: SHiRA for sparse linear layers, ``modules_to_save`` for modules kept whole.

    adapter_config.json          a SHiRA config: r, target_modules (a pattern), modules_to_save
    adapter_model.safetensors    base_model.model.<module>.shira_weight    [K]      float32: trained - base
                                 base_model.model.<module>.shira_indices   [2, K]   int32 rows and columns
                                 base_model.model.<module>.<tensor>                 of modules kept whole

SHiRA (Bhardwaj et al., arXiv 2406.13175) holds K = r · (inputs + outputs) values of each layer, one r for all:
a layer with fewer is filled up with coordinates whose difference is zero, one with more is kept whole, and r is
the one that makes the file smallest. It adds, in float32: base + (trained - base) is within rounding of the
trained value, half a unit in the last place of the difference and half of the sum. Modules kept whole are exact.

What fits: sparse changes of the weight of a plain ``nn.Linear`` whose bias is unchanged, and modules of which a
third or more is trained (SHiRA takes three times the bytes for a value). Anything else is refused by name, or, on
request, its module is kept whole. Tied weights never fit: PEFT would change one of the two.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.deltas.base import Undo
from pipeline.deltas.delta import Delta
from pipeline.deltas.target import Target, same_bits
from pipeline.errors import MismatchError
from pipeline.parameters import unwrapped

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, WEIGHT, INDICES = "base_model.model.", ".shira_weight", ".shira_indices"
NO_TARGET = "dummy-target-modules"  # what PEFT calls a config without a target
_SHOWN = 3  # parts that a refusal names with their reason


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter.

    Attributes:
        config: of ``adapter_config.json``.
        tensors: of ``adapter_model.safetensors``.
        sparse: the modules that it holds sparse.
        whole: the modules that it keeps whole.
        inexact: how many values base + (trained - base) rounds to another than the trained one.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    sparse: list[str]
    whole: list[str]
    inexact: int


def adapter_of(delta: Delta, model: nn.Module, *, whole: bool = False, source: str = "") -> Adapter:
    """Turn a delta into a PEFT adapter.

    Args:
        delta: the delta.
        model: its base, which is overwritten with the trained values.
        whole: keep modules whole that have no sparse form in PEFT, instead of refusing.
        source: where the base comes from, for the config.

    Returns:
        The adapter.

    Raises:
        MismatchError: if the model is not the base, or a part of the delta does not fit; it names the parts.
    """  # noqa: DOC502 - raised by what it calls
    network = unwrapped(model)
    delta.apply_(network)
    before = delta.undo_for(Target(network, delta.layout, delta.buffers)) or Undo({}, {})  # known after an apply
    changed = [name for name in delta.mask.index if delta.mask.count(name)]
    changed += [name for name, buffer in delta.buffers.items() if not same_bits(before.buffers[name], buffer)]
    sparse, kept = _split(delta, network, changed, whole)
    r = _rank(delta, sparse)
    kept |= {name for name, layer in sparse.items() if not _fits(delta, name, layer, r)}
    kept = {name for name, _ in network.named_modules() if _within(name, kept)}  # as PEFT finds them
    sparse = {name: layer for name, layer in sparse.items() if name not in kept}
    roots = sorted(n for n in kept if not any(n.startswith(other + ".") for other in kept))
    tensors, inexact = {}, 0
    for name, layer in sparse.items():
        after, base = delta.values[name + ".weight"], before.values[name + ".weight"]
        wide = torch.promote_types(after.dtype, torch.float32)  # in which PEFT keeps and adds differences
        difference = after.to(wide) - base.to(wide)
        inexact += int(((base.to(wide) + difference).to(after.dtype) != after).sum())
        at, difference = _filled(delta.mask.indices[name + ".weight"], difference, layer, r)
        rows, columns = at // layer.in_features, at % layer.in_features
        tensors[PREFIX + name + WEIGHT] = difference
        tensors[PREFIX + name + INDICES] = torch.stack([rows, columns]).int()
    for name in roots:
        for part, tensor in network.get_submodule(name).state_dict().items():
            tensors[f"{PREFIX}{name}.{part}"] = tensor.detach().cpu().clone()
    pattern = "|".join(name.replace(".", r"\.") for name in sparse)
    config = {
        "peft_type": "SHIRA",
        "task_type": None,
        "auto_mapping": {"base_model_class": type(network).__name__, "parent_library": type(network).__module__},
        "base_model_name_or_path": source or None,
        "revision": delta.info.get("revision") if source == delta.info.get("model") else None,
        "inference_mode": True,
        "r": max(r, 1),
        "mask_type": "random",  # what PEFT starts from, before it loads the indices
        "random_seed": 0,
        "target_modules": pattern or NO_TARGET,
        "modules_to_save": roots or None,
        "fan_in_fan_out": False,
        "init_weights": True,
    }
    return Adapter(config, tensors, list(sparse), roots, inexact)


def _split(
    delta: Delta, network: nn.Module, changed: Sequence[str], whole: bool
) -> tuple[dict[str, nn.Linear], set[str]]:
    """Tell the layers that SHiRA can hold from the modules to keep whole.

    Returns:
        Both by name.

    Raises:
        MismatchError: if a part fits neither.
    """
    parts: dict[str, list[str]] = {}
    for name in sorted(changed):
        parts.setdefault(name.rpartition(".")[0], []).append(name)
    sparse: dict[str, nn.Linear] = {}
    kept: set[str] = set()
    misfits: dict[str, str] = {}
    tied = {name for pair in delta.layout.ties.items() for name in pair}
    for place, names in parts.items():
        module = network.get_submodule(place)
        count = sum(delta.mask.count(name) for name in names if name in delta.mask.index)
        if any(name in tied for name in names):
            misfits |= dict.fromkeys(names, "is tied to another tensor")
        elif place and 3 * count >= sum(p.numel() for p in module.parameters()):
            kept.add(place)
        elif type(module) is nn.Linear and names == [f"{place}.weight"]:
            sparse[place] = module
        elif place and whole:
            kept.add(place)
        elif type(module) is not nn.Linear:
            misfits |= dict.fromkeys(names, f"is of a {type(module).__name__}, and SHiRA takes nn.Linear only")
        else:
            misfits |= dict.fromkeys(names, "is of a linear layer whose bias is trained too")
    if misfits:
        shown = "; ".join(f"'{name}' {why}" for name, why in list(misfits.items())[:_SHOWN])
        more = f"; and {len(misfits) - _SHOWN} more" if len(misfits) > _SHOWN else ""
        raise MismatchError(
            f"{len(misfits)} of {len(changed)} changed tensors do not fit a PEFT adapter: {shown}{more}; "
            "use --whole to keep their modules whole, where they are not tied, or --to dense"
        )
    return sparse, kept


def _within(name: str, kept: set[str]) -> bool:
    """Tell whether a module is kept whole, as PEFT sees it (by the end of its name), or inside one that is."""
    return any(part.endswith(end) for part in _outward(name) for end in kept)


def _outward(name: str) -> Iterable[str]:
    """Yield a module's name and those of the modules around it."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _fits(delta: Delta, name: str, layer: nn.Linear, r: int) -> bool:
    """Tell whether a layer's changes fit r: neither more than there is room for, nor more room than weights."""
    room = r * (layer.in_features + layer.out_features)
    return delta.mask.count(name + ".weight") <= room <= layer.weight.numel()


def _rank(delta: Delta, sparse: dict[str, nn.Linear]) -> int:
    """Find the r of the smallest file (12 bytes a value, 4 in a layer kept whole); 0 where no layer gains."""
    rooms = {name: layer.in_features + layer.out_features for name, layer in sparse.items()}
    candidates = {ceil(delta.mask.count(name + ".weight") / rooms[name]) for name in sparse} | {0}

    def cost(r: int) -> tuple[int, int]:
        sizes = [
            12 * r * rooms[name]
            if _fits(delta, name, layer, r)
            else 4 * sum(p.numel() for p in layer.parameters())
            for name, layer in sparse.items()
        ]
        return sum(sizes), -r

    return min(candidates, key=cost)


def _filled(at: Tensor, difference: Tensor, layer: nn.Linear, r: int) -> tuple[Tensor, Tensor]:
    """Add the lowest free coordinates, with a difference of zero, up to what r makes of the layer."""
    free = torch.ones(layer.weight.numel(), dtype=torch.bool)
    free[at] = False
    missing = r * (layer.in_features + layer.out_features) - at.numel()
    coordinates, order = torch.cat([at, free.nonzero().reshape(-1)[:missing]]).sort()
    return coordinates, torch.cat([difference, difference.new_zeros(missing)])[order]
