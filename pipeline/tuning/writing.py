"""The tuned folder: the delta, its description and its model card, in one move."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.deltas.delta import Delta
from pipeline.files import write_bytes
from pipeline.runtime.atomic_folder import replace_folder
from pipeline.runtime.workspace import VERSION
from pipeline.tuning import manifest
from pipeline.tuning.card import model_card
from pipeline.tuning.interface import Interface
from pipeline.tuning.run import Trainer


def write(trainer: Trainer, results: dict[str, Any], out: Path) -> manifest.Tuned:
    """Write the folder.

    Args:
        trainer: after its run.
        results: method -> what it left.
        out: the folder; a tuned one is replaced.

    Returns:
        Its description.
    """
    tuned, file = _described(trainer, results), trainer.folder / "fish" / manifest.DELTA
    card = model_card(
        tuned.name, Delta.load(file), tuned.delta.bytes, Interface.of_tuned(tuned), tuned, at=str(out)
    )
    with replace_folder(out) as made:
        write_bytes(made / manifest.DELTA, file.read_bytes())
        write_bytes(made / manifest.CARD, card.encode())
        tuned.save(made)
    return tuned


def _described(trainer: Trainer, results: dict[str, Any]) -> manifest.Tuned:
    plan, task, fish = trainer.plan, trainer.task, results["fish"]
    asked, found = plan.options, task.manifest
    image, tokens = found.get("image"), found.get("tokenizer")
    device, score = trainer.device, plan.task.score
    train = plan.task.train
    document = {
        "format": manifest.FORMAT,
        "version": manifest.VERSION,
        "name": plan.name,
        "base": {
            "source": plan.task.model.source, "revision": plan.task.model.revision, "digest": fish["base"],
        },
        "kind": plan.task.kind,
        "objective": plan.objective,
        "columns": {"text": plan.text, "label": plan.label if plan.text else None},
        "classes": task.classes,
        "text": {"max_length": tokens["max_length"], "pad": tokens["pad"]} if tokens else None,
        "image": {key: image[key] for key in ("shape", "mean", "std")} if image else None,
        "delta": {
            "digest": fish["digest"], "bytes": fish["bytes"], "values": fish["values"],
            "parameters": fish["parameters"], "density": fish["values"] / fish["parameters"],
        },
        "training": {
            "method": "fish", "density": plan.task.density, "head": plan.task.head, "seed": asked.seed,
            "lr": plan.lr, "epochs": train.epochs, "batch_size": train.batch_size, "optimizer": train.optimizer,
            "weight_decay": train.weight_decay, "schedule": train.schedule, "warmup": train.warmup,
            "clip": train.clip, "examples": score.examples[-1], "score_batch": score.batch_size,
            "threads": plan.threads, "device": str(device.device),
            "precision": "bf16" if device.autocast else "fp32",
        },
        "metric": plan.task.metric,
        "scores": {
            method: {k: v for k, v in result["epochs"][-1].items() if k not in ("epoch", "step")}
            for method, result in results.items()
            if result.get("epochs")
        },
        "data": {
            "train": asked.train, "validation": asked.validation, "revision": asked.revision,
            "digest": task.data_digest, "rows": task.sizes, "remarks": plan.told,
        },
        "versions": {"fishmask": VERSION} | {name: version(name) for name in ("torch", "transformers")},
    }  # fmt: skip
    return manifest.Tuned.model_validate(document)
