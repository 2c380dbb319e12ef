"""The oracle: one example at a time in float64, by plain autograd and the definition alone.

Slow and simple on purpose: it shares no rule, hook or factorisation with ``diagonal.py``, whose tests need it.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import DataError
from pipeline.fisher.batches import map_leaves, rows_of, size_of
from pipeline.fisher.objective import Loss
from pipeline.losses import example_losses, outputs_of, targets_of


def fisher_diagonal_reference(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    kind: str = "label",
    power: str = "square",
    examples: int | None = None,
    loss: Loss | None = None,
) -> dict[str, Tensor]:
    """Fisher diagonal in float64, one example at a time; the equations are those of ``fisher_diagonal``.

    Works on a float64 copy in eval mode, so the model itself is left alone.

    Args:
        model: any module.
        batches: as for ``fisher_diagonal``.
        kind: "label" or "expect".
        power: "square" or "absolute".
        examples: stop after this many examples.
        loss: (model, batch) -> losses [B] in place of ``pipeline.losses.example_losses``.

    Returns:
        Name -> float64 scores shaped like the parameter.

    Raises:
        DataError: if the batches hold no example.
    """
    model = copy.deepcopy(model).double().eval()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    seen = 0
    for batch in batches:
        batch = map_leaves(batch, lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x)
        size = size_of(batch)
        for n in range(size):
            if seen == examples:
                break
            example = rows_of(batch, n, n + 1, size)
            for weight, value in _terms(model, example, kind, loss):
                for p in parameters.values():
                    p.grad = None
                with torch.enable_grad():
                    value.backward(retain_graph=True)
                for name, p in parameters.items():
                    if p.grad is not None:
                        g = p.grad.to_dense() if p.grad.is_sparse else p.grad
                        total[name] += weight * (g.square() if power == "square" else g.abs())
            seen += 1
        if seen == examples:
            break
    if not seen:
        raise DataError("the batches hold no example")
    return {name: t.detach() / seen for name, t in total.items()}


def _terms(model: nn.Module, example: Any, kind: str, loss: Loss | None) -> list[tuple[float, Tensor]]:
    """The scalars to differentiate for one example, each with its weight.

    Returns:
        (p(y|x), log p(y|x)) for every class y, (1, f_o(x)) for every regression output, or (1, the loss).
    """
    with torch.enable_grad():
        if kind == "label":
            return [(1.0, (loss or example_losses)(model, example).sum())]
        outputs = outputs_of(model, example).reshape(-1)
        if targets_of(example).is_floating_point():
            return [(1.0, value) for value in outputs]
        logs = outputs.log_softmax(0)
        return [(float(log.detach().exp()), log) for log in logs]
