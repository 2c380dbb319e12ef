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
    return models.load_model(
        ModelSource(source, info.get("revision") if source == info.get("model") else None),
        kind=str(kind),
        outputs=int(outputs),
        seed=int(info.get("seed", 0)),
        classes=_class_names(info, int(outputs)),
        channels=int(info.get("channels") or 3),
    )


def _from_config(source: str) -> tuple[str, int]:
    """Kind and number of outputs, as the config.json of a saved classifier tells them."""
    info = classifier_info(Path(source).expanduser())
    if not info:
        raise ModelError(
            f"{source}: cannot tell its kind and number of outputs; expected a delta whose info names 'kind' and "
            "'outputs', or the folder of a saved classifier"
        )
    return info["kind"], info["outputs"]


def classifier_info(folder: Path) -> dict[str, Any]:
    """Read what the config.json of a saved classifier says of its outputs.

    Returns:
        ``kind``, ``outputs``, ``classes`` and ``problem_type``, as ``load_model`` and ``adapted_config`` take
        them; nothing where the folder holds no classifier of a known kind.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture = str((config.get("architectures") or [""])[0])
        names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
        classes = [str(names[key]) for key in sorted(names, key=int)]
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
    for kind, suffix in models.AUTO.items():
        if kind == "causal" and architecture.endswith(("ForCausalLM", "LMHeadModel")):
            return {"kind": kind, "outputs": 0, "classes": None}
        if architecture.endswith(f"For{suffix}"):
            outputs = {"outputs": len(classes), "classes": classes if len(classes) > 1 else None}
            return {"kind": kind} | outputs | {"problem_type": config.get("problem_type")}
    return {}


def adapted_config(path: Path, info: Mapping[str, Any], dtype: str | None) -> bytes:
    """Adapt a base's config.json to the model that a delta makes of it, as ``load_model`` does.

    Args:
        path: the base's config.json.
        info: as in ``load_model``; without kind and outputs the model stays of its class.
        dtype: what its weights are stored in from now on, where that changes.

    Returns:
        The new content; the old one where nothing changes.

    Raises:
        ModelError: if it is no JSON.
    """
    data = path.read_bytes()
    try:
        old = dict(json.loads(data))
    except ValueError as error:
        raise ModelError(f"{path}: is no JSON ({error}); fetch the model again") from None
    config = dict(old)
    kind, outputs = info.get("kind"), info.get("outputs")
    if kind in models.AUTO and (name := models.class_name(str(kind), str(config.get("model_type")))):
        config["architectures"] = [name]
    if kind in models.AUTO and kind != "causal" and outputs is not None:
        names = _class_names(info, int(outputs)) or ["LABEL_0"]
        config.pop("num_labels", None)
        config["id2label"] = {str(number): name for number, name in enumerate(names)}
        config["label2id"] = {name: number for number, name in enumerate(names)}
        if config.get("pad_token_id") is None and "pad" in info:
            config["pad_token_id"] = info["pad"]
        config["problem_type"] = info.get("problem_type", models.problem_type(int(outputs) > 1))
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    return data if config == old else f"{json.dumps(config, indent=2, ensure_ascii=False)}\n".encode()


def _class_names(info: Mapping[str, Any], outputs: int) -> list[str] | None:
    """The names of the classes, made up where not known; None for regression."""
    return info.get("classes") or ([str(name) for name in range(outputs)] if outputs > 1 else None)


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
