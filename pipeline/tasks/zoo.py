"""Image classifiers of torchvision and timm by name, their weights from a local safetensors file.

``torchvision:resnet18@weights/resnet18.safetensors`` names the architecture as its library does, and the file that
the library's own state dict was saved to. Nothing is downloaded, and a pickle is never opened.
"""

import importlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from pipeline.errors import ModelError, unknown
from pipeline.tasks.sources import Source

_PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl"}
_CONVERT = "load its state dict where you trust it, and save that with safetensors.torch.save_file"


def load(source: Source, outputs: int, seed: int) -> nn.Module:
    """Build a classifier and load its checkpoint; its output layer, and what the checkpoint lacks, is drawn anew.

    Args:
        source: of kind ``torchvision`` or ``timm``; ``config`` is the checkpoint.
        outputs: classes, or 1.
        seed: of what is drawn anew; torch's own generator is left as it was.

    Returns:
        The model in fp32 and eval mode, on the CPU.

    Raises:
        ModelError: if the library, the name or the file is not there, or the file is of another architecture.
    """
    written = f"{source.kind}:{source.name}"
    tensors = _checkpoint(source, written)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _built(source, outputs)
    own = model.state_dict()
    fitting = {name: t for name, t in tensors.items() if name in own and own[name].shape == t.shape}
    strange = sorted(tensors.keys() - own.keys())
    other = [name for name in own if name in tensors and name not in fitting and own[name].shape[:1] != (outputs,)]
    lacking = sum(own[name].numel() for name in own if name not in tensors)
    if strange or other or 2 * lacking > sum(t.numel() for t in own.values()):
        where = f"tensor '{(other or strange or [name for name in own if name not in tensors])[0]}'"
        raise ModelError(f"model.source: {source.config} is no checkpoint of {written}: {where} does not fit")
    model.load_state_dict(fitting, strict=False)
    return model.float().eval()


def _checkpoint(source: Source, written: str) -> dict[str, torch.Tensor]:
    if source.config is None:
        raise ModelError(f"model.source: '{written}' names no checkpoint; expected {written}@FILE.safetensors")
    path = Path(source.config).expanduser()
    if not path.is_file():
        raise ModelError(f"model.source: {path}: no such file; expected {written}@FILE.safetensors")
    if path.suffix in _PICKLES:
        raise ModelError(f"model.source: {path} is a pickle, which can run any code; it is not loaded; {_CONVERT}")
    try:
        return load_file(path)
    except Exception as error:  # the library raises its own kinds of error for what is no safetensors file
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"model.source: {path} is no safetensors file: {why}; {_CONVERT}") from None


def _built(source: Source, outputs: int) -> nn.Module:
    try:
        library: Any = importlib.import_module("torchvision.models" if source.kind == "torchvision" else "timm")
    except ImportError:
        raise ModelError(f"model.source: '{source.kind}' is not installed; pip install {source.kind}") from None
    names = library.list_models()
    if source.name not in names:
        raise ModelError(
            f"model.source: {source.kind} has no model {unknown(source.name, names).partition(' (')[0]}"
        )
    if source.kind == "timm":
        made: nn.Module = library.create_model(source.name, pretrained=False, num_classes=outputs)
        return made
    extra = {"aux_logits": False, "init_weights": True} if source.name in ("googlenet", "inception_v3") else {}
    made = library.get_model(source.name, weights=None, num_classes=outputs, **extra)
    return made
