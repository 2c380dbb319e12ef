"""Tuned folders whose deltas are drawn instead of trained, so that every value is known."""

import torch

from pipeline.deltas.delta import Delta
from pipeline.masks.mask import Mask
from pipeline.parameters import ParameterIndex
from pipeline.tasks.saved import load_model
from pipeline.tuning.manifest import Tuned

DIGEST = "0123456789abcdef" * 4
TRAINING = {
    "method": "fish", "density": 0.05, "head": ["classifier"], "seed": 0, "lr": {"fish": 0.002}, "epochs": 1,
    "batch_size": 8, "optimizer": "adamw", "weight_decay": 0.0, "schedule": "linear", "warmup": 0.0, "clip": None,
    "examples": 8, "score_batch": 8, "threads": 1, "device": "cpu", "precision": "fp32",
}  # fmt: skip


def make_tuned(
    folder, base, classes=("bad", "good"), text=("review",), seed=1, label="verdict", max_length=12, head=0,
    kind="text", image=None,
):  # fmt: skip
    """Write a tuned folder whose delta holds drawn values.

    Returns:
        The trained model, in eval mode.
    """
    objective = "completion" if kind == "causal" else "classification" if classes else "regression"
    info = {
        "model": str(base), "revision": None, "kind": kind, "classes": list(classes) or None, "seed": head,
        "outputs": 0 if kind == "causal" else len(classes) or 1, "channels": image and image["shape"][0],
        "task": folder.name,
    }  # fmt: skip
    model, trained = (load_model(str(base), info=info) for _ in range(2))
    index = ParameterIndex.of(model)
    draw = torch.Generator().manual_seed(seed)
    chosen = {}
    for name in index:
        size = index.numel(name)
        count = size if name.startswith(("classifier.", "fc.")) else max(size // 20, 1)
        chosen[name] = torch.randperm(size, generator=draw)[:count].sort().values
    mask = Mask(index, chosen)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            flat = parameter.view(-1)
            flat[chosen[name]] += torch.randn(len(chosen[name]), generator=draw)
    delta = Delta.of(trained, mask, base=model, info=info)
    folder.mkdir(parents=True)
    size = delta.save(folder / "delta.safetensors")
    metric = {"classification": "accuracy", "regression": "pearson", "completion": "token_accuracy"}[objective]
    Tuned.model_validate({
        "format": "fishmask-tune", "version": 1, "name": folder.name,
        "base": {"source": str(base), "revision": None, "digest": delta.base},
        "kind": kind, "objective": objective, "classes": list(classes) or None,
        "columns": {"text": [] if image else list(text), "label": None if image else label},
        "text": None if image else {"max_length": max_length, "pad": 0}, "image": image,
        "delta": {
            "digest": delta.digest, "bytes": size, "values": mask.nnz, "parameters": index.total,
            "density": mask.nnz / index.total,
        },
        "training": TRAINING, "metric": metric, "scores": {"fish": {metric: 0.75, "loss": 0.5}},
        "data": {
            "train": "reviews.csv", "validation": None, "revision": None, "digest": DIGEST,
            "rows": {"train": 8, "validation": 4}, "remarks": [],
        },
        "versions": {"fishmask": "0.1.0"},
    }).save(folder)  # fmt: skip
    return trained
