"""Tuned folders over one tiny BERT: what training would leave is made by hand, so that every value is known."""

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
    folder, base, classes=("bad", "good"), text=("review",), seed=1, label="verdict", max_length=12, head=0
):
    """Write a tuned folder whose delta holds drawn values, and return its model.

    Returns:
        The trained model, in eval mode.
    """
    outputs = len(classes) or 1
    info = {
        "model": str(base), "revision": None, "kind": "text", "outputs": outputs, "classes": list(classes) or None,
        "channels": None, "seed": head, "task": folder.name,
    }  # fmt: skip
    model, trained = (load_model(str(base), info=info) for _ in range(2))
    index = ParameterIndex.of(model)
    draw = torch.Generator().manual_seed(seed)
    chosen = {}
    for name in index:
        size = index.numel(name)
        count = size if name.startswith("classifier.") else max(size // 20, 1)
        chosen[name] = torch.randperm(size, generator=draw)[:count].sort().values
    mask = Mask(index, chosen)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            flat = parameter.view(-1)
            flat[chosen[name]] += torch.randn(len(chosen[name]), generator=draw)
    delta = Delta.of(trained, mask, base=model, info=info)
    folder.mkdir(parents=True)
    size = delta.save(folder / "delta.safetensors")
    objective = "classification" if classes else "regression"
    metric = "accuracy" if classes else "pearson"
    Tuned.model_validate({
        "format": "fishmask-tune", "version": 1, "name": folder.name,
        "base": {"source": str(base), "revision": None, "digest": delta.base},
        "kind": "text", "objective": objective, "columns": {"text": list(text), "label": label},
        "classes": list(classes) or None, "text": {"max_length": max_length, "pad": 0}, "image": None,
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
