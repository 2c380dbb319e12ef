"""What any method trains of a task's model: its mask, and the model with an adapter where the method is one.

``pipeline.training.methods.mask_for`` covers the methods that need the base and a ranking; here stand those that
need the task's data too, or PEFT.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from pipeline.errors import ParamsError
from pipeline.masks.mask import Mask
from pipeline.masks.ranking import Ranking
from pipeline.tasks.adapters import attach, lora, shira
from pipeline.tasks.base import Task
from pipeline.tasks.learning import learned_mask
from pipeline.training.device import Device
from pipeline.training.methods import mask_for, method_named
from pipeline.training.recipe import Recipe


@dataclass(frozen=True)
class Learning:
    """How masks are learned, for the methods that learn theirs.

    Attributes:
        recipe: of the task, at the rate of ``dense``.
        batch_size: examples per batch.
        device: where, and in which precision.
        epochs: in place of the recipe's; 0 keeps them.
        penalty: of an open gate.
        split: what to train on.
    """

    recipe: Recipe
    batch_size: int
    device: Device
    epochs: int = 0
    penalty: float = 1.25e-7
    split: str = "train"


def choose(
    name: str,
    task: Task,
    model: nn.Module,
    *,
    density: float,
    head: Sequence[str],
    seed: int,
    ranking: Ranking | Mapping[str, Tensor] | None = None,
    learning: Learning | None = None,
) -> tuple[nn.Module, Mask]:
    """Choose what a method trains.

    Args:
        name: the method's.
        task: the data.
        model: the base; on the device of ``learning`` where the method learns its mask.
        density: chosen / all, head included.
        head: the head's module names.
        seed: of whatever the method draws.
        ranking: Fisher scores or a ranking of them, for methods that need them.
        learning: for methods that learn their mask.

    Returns:
        The model to train, wrapped where the method is an adapter, and the mask of its trained values.

    Raises:
        ParamsError: if the method is unknown, or lacks what it needs.
    """
    method = method_named(name)
    if method.strategy == "adapter":
        model, mask = lora(model, density, head, seed)
    elif method.strategy == "peft":
        mask = shira(model, density, head, seed)
    elif method.strategy == "learned":
        if learning is None:
            raise ParamsError(f"method '{name}' learns its mask by a training; use the mask stage")
        mask = learned_mask(
            name, task, model, learning.recipe, learning.batch_size, learning.device, density=density, head=head,
            epochs=learning.epochs, penalty=learning.penalty, split=learning.split,
        )  # fmt: skip
    else:
        mask = mask_for(name, model, density=density, head=head, seed=seed, ranking=ranking)
    mask.info |= {"method": name, "density": mask.nnz / parameters_of(mask)}
    return model, mask


def trained_model(model: nn.Module, mask: Mask) -> nn.Module:
    """The model that a mask is of: the base itself, or the base with the adapter that the mask names."""
    return attach(model, mask.info["adapter"]) if "adapter" in mask.info else model


def parameters_of(mask: Mask) -> int:
    """Count the base's parameters; the index of an adapter's mask holds the trained ones alone."""
    return int(mask.info["adapter"]["parameters"]) if "adapter" in mask.info else mask.index.total
