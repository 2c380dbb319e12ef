"""Other ways to the same scores: the one-example loop, ``torch.func.vmap``, BackPACK; and their limit."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from pipeline.fisher import fisher_diagonal
from pipeline.fisher.batches import leaves_of, rows_of
from pipeline.losses import example_losses, losses_from, outputs_of

Method = Callable[[nn.Module, Any, int], dict[str, Tensor] | None]
FEW = 4  # examples of the expected Fisher's one-example loop, and of the comparison with the oracle


def plain(model: nn.Module, batch: Any, size: int) -> None:
    """The limit: one batched forward and backward."""
    model.zero_grad(set_to_none=True)
    example_losses(model, batch).mean().backward()
    model.zero_grad(set_to_none=True)


def ours(kind: str) -> Method:
    """Make a method of fisher_diagonal."""
    return lambda model, batch, size: fisher_diagonal(model, [batch], kind=kind)


def loop(model: nn.Module, batch: Any, size: int) -> dict[str, Tensor]:
    """The method's first implementation: one example at a time, squares accumulated."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(size):
        model.zero_grad(set_to_none=True)
        example_losses(model, rows_of(batch, n, n + 1, size)).sum().backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                total[name] += p.grad.square()
    model.zero_grad(set_to_none=True)
    return {name: t / size for name, t in total.items()}


def expected_loop(model: nn.Module, batch: Any, size: int) -> dict[str, Tensor]:
    """The same for the expected Fisher: every class of every example (of a few examples, to be done today)."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(FEW):
        logs = outputs_of(model, rows_of(batch, n, n + 1, size))[0].log_softmax(0)
        for log in logs:
            model.zero_grad(set_to_none=True)
            log.backward(retain_graph=True)
            for name, p in model.named_parameters():
                if p.grad is not None:
                    total[name] += log.detach().exp() * p.grad.square()
    model.zero_grad(set_to_none=True)
    return {name: t / FEW for name, t in total.items()}


def by_vmap(model: nn.Module, batch: Any, size: int) -> dict[str, Tensor]:
    """torch.func.vmap(grad), four examples at a time."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    if isinstance(
        batch, dict
    ):  # vmap cannot follow what transformers asks of a mask; here all tokens count anyway
        batch = {key: value for key, value in batch.items() if key != "attention_mask"}
    keys = list(batch) if isinstance(batch, dict) else None

    def loss(parameters: dict[str, Tensor], *rows: Tensor) -> Tensor:
        if keys is None:
            return losses_from(functional_call(model, parameters, (rows[0][None],)), rows[1][None]).sum()
        inputs = {key: row[None] for key, row in zip(keys, rows, strict=True)}
        labels = inputs.pop("labels")
        return losses_from(functional_call(model, parameters, (), inputs).logits, labels).sum()

    tensors = list(leaves_of(batch))
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for start in range(0, size, 4):
        part = [t[start : start + 4] for t in tensors]
        grads = vmap(grad(loss), in_dims=(None, *[0] * len(part)), randomness="same")(parameters, *part)
        for name, g in grads.items():
            total[name] += g.square_().sum(0)
    return {name: t / size for name, t in total.items()}


def by_backpack(model: nn.Module, batch: Any, size: int) -> dict[str, Tensor]:
    """BackPACK's SumGradSquared."""
    from backpack import backpack, extend
    from backpack.extensions import SumGradSquared

    if not hasattr(model, "by_backpack"):
        model.by_backpack = _extended(model)
    criterion = extend(nn.CrossEntropyLoss(reduction="sum"))
    targets = batch["labels"] if isinstance(batch, dict) else batch[1]
    with backpack(SumGradSquared()):
        criterion(outputs_of(model.by_backpack, batch), targets).backward()
    scores = {name: p.sum_grad_squared / size for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return scores


def _extended(model: nn.Module) -> nn.Module:
    """Let BackPACK's hooks into a model; a residual network is traced without what changes a tensor in place."""
    from backpack import extend

    if any(isinstance(module, nn.Embedding) for module in model.modules()):
        return extend(model)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    traced = torch.fx.symbolic_trace(model)
    for node in traced.graph.nodes:
        node.target = operator.add if node.target is operator.iadd else node.target
    traced.recompile()
    return extend(traced, use_converter=True)


PLAIN, OURS = "plain forward+backward", "fisher_diagonal"
LABEL: dict[str, Method] = {
    PLAIN: plain,
    OURS: ours("label"),
    "one example at a time": loop,
    "torch.func.vmap(grad)": by_vmap,
    "BackPACK SumGradSquared": by_backpack,
}
EXPECT: dict[str, Method] = {
    PLAIN: plain,
    OURS: ours("label"),
    "fisher_diagonal, expect": ours("expect"),
    "expect, one example at a time": expected_loop,
}
