"""How a masked model is trained: the settings, checked, and the optimizer they name."""

import math
from dataclasses import dataclass

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from pipeline.errors import ParamsError
from pipeline.training.schedule import SCHEDULES

OPTIMIZERS = ("adamw", "adam", "sgd")


@dataclass(frozen=True)
class Recipe:
    """How a masked model is trained.

    Attributes:
        epochs: passes over the data.
        lr: peak learning rate.
        optimizer: ``adamw`` (decoupled decay), ``adam`` (decay as part of the gradient) or ``sgd`` (Nesterov
            momentum).
        weight_decay: acts on θ only, frozen values stay as they are.
        momentum: of ``sgd``.
        schedule: ``linear``, ``piecewise`` or ``constant``, see ``pipeline.training.schedule``.
        warmup: fraction of the optimizer steps over which the rate rises.
        clip: largest norm of θ's gradient; None for no clipping.
        accumulate: batches per optimizer step.
        seed: of dropout and whatever else the model draws.

    Raises:
        ParamsError: if a value is out of range; names the field.
    """

    epochs: int
    lr: float
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    momentum: float = 0.9
    schedule: str = "linear"
    warmup: float = 0.0
    clip: float | None = None
    accumulate: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        rules = [
            ("epochs", self.epochs >= 1, "at least 1"),
            ("lr", math.isfinite(self.lr) and self.lr > 0, "a number above 0"),
            ("optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("momentum", 0 <= self.momentum < 1, "at least 0 and below 1"),
            ("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            ("warmup", 0 <= self.warmup <= 1, "a fraction of the steps between 0 and 1"),
            ("clip", self.clip is None or self.clip > 0, "a number above 0, or none"),
            ("accumulate", self.accumulate >= 1, "at least 1"),
        ]
        for name, holds, expected in rules:
            if not holds:
                raise ParamsError(f"recipe: {name} is {getattr(self, name)!r}; expected {expected}")


def make_optimizer(values: nn.Parameter, recipe: Recipe) -> Optimizer:
    """Make the recipe's optimizer on θ; its state is O(k).

    Returns:
        A ``torch.optim`` optimizer, fused where torch has the fused form.
    """
    fused = values.device.type in ("cpu", "cuda")  # ~5x on a θ of millions: one pass over it instead of ten
    if recipe.optimizer == "sgd":
        nesterov = recipe.momentum > 0
        return SGD(
            [values],
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=nesterov,
            weight_decay=recipe.weight_decay,
            fused=fused,
        )
    kind = AdamW if recipe.optimizer == "adamw" else Adam
    return kind([values], lr=recipe.lr, weight_decay=recipe.weight_decay, fused=fused)
