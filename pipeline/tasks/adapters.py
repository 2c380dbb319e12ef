"""PEFT's methods beside ours: LoRA as an adapter around the model, SHiRA as the coordinates that PEFT draws.

Both take the largest rank r whose trained values, head included, fit the budget of the density. A LoRA run trains
its adapter's values and the head through the same loop, optimizer and order of data as a mask does; what it leaves
is PEFT's own adapter folder, counted byte by byte. (Merged into the base it would change every weight of its
modules, a delta of nearly the model's size.) SHiRA's values live at coordinates of the base, so it is a mask like
any other, and leaves a delta.
"""

import contextlib
import hashlib
import importlib.util
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.errors import ParamsError
from pipeline.files import write_bytes
from pipeline.masks.budget import split_budget
from pipeline.masks.mask import Mask
from pipeline.masks.select import dense
from pipeline.parameters import ParameterIndex

FOLDER = "adapter"
_FILES = ("adapter_config.json", "adapter_model.safetensors")


def lora(model: nn.Module, density: float, head: Sequence[str], seed: int) -> tuple[nn.Module, Mask]:
    """Put LoRA around every linear layer outside the head (Hu et al. 2021, arXiv 2106.09685).

    W x becomes W x + (alpha / r) B A x with A [r, in] drawn with the seed, B [out, r] zero, alpha = 2 r; no
    dropout. A layer that PEFT takes for the head, since its name ends alike (DistilBERT's ``pre_classifier``
    beside ``classifier``), stays as it is and is stored as it is.

    Args:
        model: the base; it is wrapped, its weights stay as they are.
        density: trained values / the base's parameters, at most; the head is trained as it is and counts.
        head: the head's module names.
        seed: of A.

    Returns:
        The wrapped model, and the mask of all its trained values, whose ``info["adapter"]`` makes it again.
    """
    index = ParameterIndex.of(model)
    rank = _rank(index, _adapted(model, head), density, head)
    info = {"kind": "lora", "rank": rank, "head": list(head), "seed": seed, "parameters": index.total}
    wrapped = attach(model, info)
    mask = dense(ParameterIndex.of(wrapped))
    mask.info["adapter"] = info
    return wrapped, mask


def attach(model: nn.Module, info: dict[str, Any]) -> nn.Module:
    """Wrap a model as the run was that recorded ``info``, with its values as they were drawn.

    Returns:
        PEFT's model.
    """
    peft = _peft()
    config = peft.LoraConfig(
        r=info["rank"], lora_alpha=2 * info["rank"], lora_dropout=0.0, bias="none",
        target_modules=sorted(_adapted(model, info["head"])), modules_to_save=info["head"],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), _silent():
        torch.default_generator.manual_seed(info["seed"])
        wrapped: nn.Module = peft.get_peft_model(model, config)
    for name in _namesakes(model, info["head"]):
        model.get_submodule(name).requires_grad_(False)
    return wrapped.eval()


def save_adapter(wrapped: nn.Module, folder: Path, source: str) -> dict[str, Any]:
    """Write a trained adapter as ``PeftModel.from_pretrained`` reads it.

    Args:
        wrapped: the trained model of ``attach``.
        folder: where to.
        source: the base model's name, for whoever finds the adapter.

    Returns:
        ``delta_bytes``, of both files together, and ``delta_digest``.
    """
    from safetensors.torch import save

    peft = _peft()
    tensors = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    plain = {name: value.detach().cpu().contiguous() for name, value in sorted(tensors.items())}
    kind: Any = wrapped
    config = kind.peft_config["default"].to_dict() | {"base_model_name_or_path": source, "inference_mode": True}
    text = json.dumps(config, indent=2, sort_keys=True, default=sorted)  # PEFT holds some lists as sets
    contents = (text.encode(), save(plain, {"format": "pt"}))
    folder.mkdir(parents=True, exist_ok=True)
    state = hashlib.blake2b(digest_size=32)
    for name, content in zip(_FILES, contents, strict=True):
        write_bytes(folder / name, content)
        state.update(content)
    return {"delta_bytes": sum(map(len, contents)), "delta_digest": state.hexdigest()}


def load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """Put a saved adapter on its base.

    Returns:
        PEFT's model, in eval mode.
    """
    peft = _peft()
    with _silent():
        wrapped: nn.Module = peft.PeftModel.from_pretrained(model, str(folder))
    return wrapped.eval()


def shira(model: nn.Module, density: float, head: Sequence[str], seed: int) -> Mask:
    """Choose the coordinates of PEFT's SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175).

    r (in + out) of every linear layer. PEFT draws them at random, for layers of one shape alike. Its values start
    at zero and are added to the weight: training the weight itself there is the same.

    Args:
        model: the base.
        density: chosen / all, at most; head included.
        head: the head's module names.
        seed: of the draw.

    Returns:
        The mask.

    Raises:
        ParamsError: if the rank asks for more coordinates than a layer has.
    """
    _peft()
    from peft.tuners.shira.mask_functions import random_mask

    index = ParameterIndex.of(model)
    layers = _linears(model, head, transposed=False)
    rank = _rank(index, layers, density, head)
    chosen: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        if rank * sum(layer.weight.shape) > layer.weight.numel():
            raise ParamsError(
                f"shira: rank {rank} asks for more than tensor '{name}.weight' has; lower the density"
            )
        drawn: Any = random_mask(layer, rank, random_seed=seed)
        chosen[f"{name}.weight"] = drawn.reshape(-1).nonzero().reshape(-1)
    mask = Mask.covering(index, index.within(head), chosen)
    mask.info |= {"rank": rank, "seed": seed}
    return mask


def _linears(model: nn.Module, head: Sequence[str], *, transposed: bool) -> dict[str, Any]:
    """The linear layers outside the head, and transformers' ``Conv1D`` (GPT-2's, its weight transposed)."""
    kinds: tuple[type[nn.Module], ...] = (nn.Linear,)
    if transposed:
        from transformers.pytorch_utils import Conv1D

        kinds += (Conv1D,)
    outside = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    modules = {name: model.get_submodule(name) for name in outside}
    return {
        name: module
        for name, module in modules.items()
        if not any(name == part or name.startswith(part + ".") for part in head)
    }


def _adapted(model: nn.Module, head: Sequence[str]) -> dict[str, Any]:
    """The layers of LoRA."""
    taken = _namesakes(model, head)
    layers = _linears(model, head, transposed=True)
    return {n: layer for n, layer in layers.items() if not any(f"{n}.".startswith(f"{m}.") for m in taken)}


def _namesakes(model: nn.Module, head: Sequence[str]) -> list[str]:
    """The modules beside the head that PEFT takes for it: it goes by how a name ends, and has no other way."""
    ends = tuple(head)
    return [name for name, _ in model.named_modules() if ends and name.endswith(ends) and name not in ends]


def _rank(index: ParameterIndex, layers: dict[str, Any], density: float, head: Sequence[str]) -> int:
    """The largest r with r * sum(in + out) <= floor(density * n) - head."""
    _, rest = split_budget(index, density, head)
    each = sum(sum(layer.weight.shape) for layer in layers.values())
    if not each:
        raise ParamsError("the network has no linear layer outside its head: LoRA and SHiRA have nothing to adapt")
    if rest < each:
        raise ParamsError(
            f"a budget of {rest} values beside the head holds no LoRA or SHiRA of rank 1 on {len(layers)} linear "
            f"layers, which takes {each}; raise the density"
        )
    return int(rest // each)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """PEFT warns of what it then does right: layers stored transposed, names of transformers on their way out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _peft() -> Any:
    if importlib.util.find_spec("peft") is None:
        raise ParamsError("methods lora and shira need PEFT; pip install 'fishmask[peft]'")
    import peft

    return peft
