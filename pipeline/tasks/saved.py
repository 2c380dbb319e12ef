"""Models by source alone, as deltas name them: load one again, and write one as a folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from pipeline.errors import ModelError, StorageError
from pipeline.files import write_bytes
from pipeline.tasks import models


@dataclass(frozen=True)
class ModelSource:
    """The settings of a model that is known by its source.

    Attributes:
        source: as in params.yaml.
        revision: of a hub id.
        max_length: not needed to load a model.
    """

    source: str
    revision: str | None = None
    max_length: int | None = None


def load_model(source: str, *, info: Mapping[str, Any]) -> nn.Module:
    """Load the model that a delta was trained from, or the same architecture from another source.

    Args:
        source: package:, builtin:, a hub id or a folder.
        info: ``Task.model_info`` and the ``seed``, as a delta's info keeps them. A folder whose config.json names
            a classifier with its labels needs none of it.

    Returns:
        The model in fp32 and eval mode, on the CPU; its head as the seed draws it. A ModelError if it cannot be
        loaded, or neither ``info`` nor the folder says how many outputs it has.
    """
    kind, outputs = info.get("kind"), info.get("outputs")
    if kind is None or outputs is None:
        kind, outputs = _from_config(source)
    classes = [str(name) for name in range(int(outputs))] if int(outputs) > 1 else None
    return models.load_model(
        ModelSource(source, info.get("revision") if source == info.get("model") else None),
        kind=str(kind),
        outputs=int(outputs),
        seed=int(info.get("seed", 0)),
        classes=info.get("classes") or classes,
        channels=int(info.get("channels") or 3),
    )


def _from_config(source: str) -> tuple[str, int]:
    """Kind and number of outputs, as the config.json of a saved classifier tells them."""
    path = Path(source).expanduser() / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        architecture = str((config.get("architectures") or [""])[0])
    except (OSError, ValueError, AttributeError):
        architecture, config = "", {}
    for kind, suffix in (("text", "ForSequenceClassification"), ("image", "ForImageClassification")):
        if architecture.endswith(suffix):
            return kind, len(config.get("id2label") or (0, 1))
    raise ModelError(
        f"{source}: cannot tell its kind and number of outputs; expected a delta whose info names 'kind' and "
        "'outputs', or the folder of a saved classifier"
    )


def save_model(network: nn.Module, source: str, folder: Path) -> None:
    """Write a model as a folder: the hub's layout with its tokenizer, or a builtin's ``model.safetensors``.

    Args:
        network: what to write.
        source: where it came from, hence whose tokenizer belongs to it.
        folder: made if missing.

    Raises:
        StorageError: if the folder cannot be written.
    """
    hub_layout: Any = getattr(network, "save_pretrained", None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if hub_layout is None:
            tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
            write_bytes(folder / "model.safetensors", save(tensors, {"format": "pt"}))
            return
        text = hasattr(network.config, "vocab_size")
        tokenizer = models.load_tokenizer(ModelSource(source)) if text else None
        hub_layout(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except OSError as error:
        raise StorageError(f"{folder}: cannot write the model: {error.strerror or error}") from None
