"""Which modules of a model are its head: freshly drawn, hence trained whole and inside the budget."""

from collections.abc import Callable

from torch import nn

from pipeline.errors import ModelError
from pipeline.masks.budget import budget, split_budget
from pipeline.parameters import ParameterIndex, tensor_digest

_SHARE = 0.5  # of the budget, that all fresh modules together may take


def head_of(load: Callable[[int], nn.Module], outputs: int, density: float, told: list[str]) -> list[str]:
    """Find the head of a classifier.

    What two seeds draw differently is fresh: the output layer, and whatever else the checkpoint lacks (a pooler, a
    layer before the output). All of it is the head while it takes half of the budget at most; else the output
    layer alone is, and the scores decide about the rest.

    Args:
        load: seed -> the model.
        outputs: classes, or 1.
        density: updated / all parameters.
        told: takes a sentence where fresh modules are left to the scores.

    Returns:
        Module names. A model without a layer of that many outputs is a ModelError, a density that does not hold it
        a ParamsError.
    """
    model = load(0)
    index = ParameterIndex.of(model)
    last = _output_layer(model, outputs)
    digests = {name: tensor_digest(p) for name, p in model.named_parameters()}
    del model
    fresh = {
        name.rpartition(".")[0] for name, p in load(1).named_parameters() if digests.get(name) != tensor_digest(p)
    } | {last}
    split_budget(index, density, [last])  # refuses a density that is too small, before anything is computed
    size = sum(index.numel(name) for name in index.within(fresh))
    if size <= _SHARE * budget(density, index.total):
        return sorted(fresh)
    others = sorted(fresh - {last})
    if others and size < index.total / 2:  # else the whole model is fresh, as a builtin one is
        told.append(
            f"the checkpoint lacks {', '.join(others)} as well; too large for the budget, so the scores decide "
            f"what of them is trained, and only {last} is trained whole"
        )
    return [last]


def _output_layer(model: nn.Module, outputs: int) -> str:
    """The last layer whose weight has a row for each output."""
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter)
        and weight.ndim >= 2
        and weight.shape[0] == outputs
    ]
    if not layers:
        raise ModelError(f"{type(model).__name__} has no layer of {outputs} outputs; expected a classifier's")
    return str(layers[-1])
