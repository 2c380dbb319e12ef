"""The diagonal of the empirical and of the expected Fisher information, exact per example, a batch at a time."""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import DataError, ModelError, ParamsError
from pipeline.fisher.batches import moved, rows_of, size_of
from pipeline.fisher.fallback import add_whole, close
from pipeline.fisher.layers import rule_for, zero_scores
from pipeline.fisher.objective import Loss, Objective
from pipeline.fisher.passes import Plan
from pipeline.fisher.plan import Planner, Single
from pipeline.fisher.products import Work
from pipeline.fisher.trace import Calls, Graph

KINDS = ("label", "expect")
POWERS = ("square", "absolute")


def fisher_diagonal(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    kind: str = "label",
    power: str = "square",
    examples: int | None = None,
    loss: Loss | None = None,
    chunk: int | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Score every trainable parameter by its Fisher information, averaged over N examples.

    With g_n the gradient of example n's own loss (Sung, Nair and Raffel 2021, section 3):

    * label, square: F_i = (1/N) Σ_n g_n,i²; label, absolute: (1/N) Σ_n |g_n,i|;
    * expect, classes: (1/N) Σ_n Σ_y p(y|x_n) (∂ log p(y|x_n) / ∂θ_i)², over all classes y, without sampling;
    * expect, regression: (1/N) Σ_n Σ_o (∂f_o(x_n) / ∂θ_i)², a Gaussian of unit variance;
    * expect, absolute: |·| in place of (·)².

    It is never the square of a batch's mean gradient. The model runs in eval mode (no dropout, BatchNorm on its
    running statistics), without autocast or TF32; its modes, gradients and hooks are as before when this returns
    or raises. Neither the order nor the size of the batches changes more than rounding. One forward serves all
    passes: one for "label" or two classes, C - 1 for C classes (C for "absolute"), one per regression output.

    Layer kinds in ``layers.RULES`` work on whole batches; whatever else a model does with a parameter is found in
    the autograd graph and takes an exact, slower way (``plan.py``). A model whose examples affect each other, as
    BatchNorm without running statistics makes them, is run one example at a time.

    Memory beyond the scores is that of the model's forward and backward, without weight gradients, plus ``chunk``.

    Args:
        model: any module whose loss is a function of its parameters.
        batches: yields mappings with "labels" or pairs (inputs, targets): integer classes [B] with outputs [B, C],
            or floats, for regression. Every tensor whose first dimension is B is cut by example.
        kind: "label" (empirical) or "expect".
        power: "square" or "absolute".
        examples: stop at exactly this many examples, cutting the last batch; None or more than there are: all.
        loss: (model, batch) -> per-example losses [B], in place of ``pipeline.losses.example_losses``.
        chunk: bytes of temporary tensors a layer's rule may hold (one example's are held in any case); None:
            16 MiB on a CPU, 256 MiB elsewhere.
        device: where batches are moved; None: the device of the first parameter.

    Returns:
        Name -> scores shaped like the parameter, on its device, fp32 (float64 for a float64 parameter); parameters
        that require a gradient, in ``named_parameters`` order, tied ones once, unused ones all zero.

    Raises:
        ParamsError: for an unknown kind or power, ``examples`` or ``chunk`` below 1, ``loss`` with "expect", or a
            device the model is not on.
        DataError: if there is no example, or a batch, its targets or its losses do not fit.
        ModelError: if no parameter requires a gradient, or the loss depends on none.
    """
    _check(kind, power, examples, loss, chunk)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ModelError(f"no parameter of {type(model).__name__} requires a gradient; nothing to score")
    home = next(iter(parameters.values())).device
    if device is not None and _indexed(torch.device(device)) != _indexed(home):
        raise ParamsError(
            f"device is '{device}' but the model is on '{home}'; move it first: model.to('{device}')"
        )
    work = Work(power, chunk or (16 if home.type == "cpu" else 256) * 2**20)
    with _evaluating(model, home):
        scorer = Scorer(model, parameters, Objective(kind, power, loss), work)
        for batch in batches:
            size = size_of(batch)
            take = size if examples is None else min(size, examples - scorer.seen)
            batch = moved(rows_of(batch, 0, take, size) if take < size else batch, home)
            if take:
                scorer.add(batch, take)
            if scorer.seen == examples:
                break
    if not scorer.seen:
        raise DataError("the batches hold no example; the Fisher diagonal is an average over at least one")
    return {name: _mean(total, scorer.seen) for name, total in scorer.scores.items()}


class Scorer:
    """Sums of scores over the examples seen so far.

    Attributes:
        scores: name -> sum of ψ(g_n) over the examples.
        seen: number of examples.
        routes: name -> the way its score took in the last batch (``plan.Plan.routes``).
    """

    def __init__(
        self, model: nn.Module, parameters: dict[str, nn.Parameter], objective: Objective, work: Work
    ) -> None:
        self.model = model
        self.parameters = parameters
        self.objective = objective
        self.work = work
        rules = {name: rule for name, m in model.named_modules() if (rule := rule_for(m)) is not None}
        self.planner = Planner(model, parameters, rules, work)
        self.scores = {name: zero_scores(p) for name, p in parameters.items()}
        self.seen = 0
        self.routes: dict[str, str] = {}
        self._singles: dict[Any, Single] = {}

    def add(self, batch: Any, size: int) -> None:
        """Add the scores of a batch of ``size`` examples."""
        calls, root, graph = self._forward(batch, size)
        seeds = self.objective.seeds(root, batch)
        plan = None if graph.reentrant else self._plan(batch, size, calls, root, graph)
        del calls  # the plan keeps what it needs; layer inputs can go as the backward passes them
        if plan is None:
            self.routes = dict.fromkeys(self.parameters, "whole")
            left, hidden = list(self.parameters), graph.opaque
        else:
            plan.backward(root, seeds, graph)
            left = plan.whole + [name for replay in plan.replays for name in replay.finish()]
            self.routes, hidden = plan.routes, graph.opaque
        if left:
            names = {name: self.parameters[name] for name in left}
            add_whole(self.model, self.objective, batch, size, names, self.scores, self.work, hidden=hidden)
        self.seen += size

    def _forward(self, batch: Any, size: int) -> tuple[Calls, Tensor, Graph]:
        with Calls(self.model) as calls:
            root = self.objective.root(self.model, batch, size)
        if not root.requires_grad:
            what = f"the {'loss' if self.objective.kind == 'label' else 'output'} of {type(self.model).__name__}"
            raise ModelError(f"{what} depends on no parameter that requires a gradient")
        return calls, root, Graph(root)

    def _plan(self, batch: Any, size: int, calls: Calls, root: Tensor, graph: Graph) -> Plan | None:
        """Plan a batch, comparing it with one of its examples alone if no batch of this form has been yet.

        Returns:
            The plan; None if the example alone gives other values, so that no batch can stand for its examples.
        """
        form = (size, *((c.name, *(tuple(x.shape) for x in (*c.inputs, *c.outputs))) for c in calls.calls))
        single = self._singles.get(form)
        if single is not None and not graph.selects:
            return self.planner.plan(calls, graph, single, size, self.scores)
        if size == 1:
            single = self._singles[form] = Single.of(calls, graph, self.parameters)
            return self.planner.plan(calls, graph, single, size, self.scores)
        n = size // 2
        alone, alone_root, alone_graph = self._forward(rows_of(batch, n, n + 1, size), 1)
        single = Single.of(alone, alone_graph, self.parameters)
        plan = self.planner.plan(calls, graph, single, size, self.scores)
        once = alone.once()
        pairs = [(layout.part(a, n), once[name].inputs[i].detach()) for name, i, a, layout in plan.checks]
        offset = 1 if self.objective.kind == "label" else 0  # a loss near zero carries the rounding of its logits
        pairs.append((root.detach()[n : n + 1] + offset, alone_root.detach() + offset))
        if not all(close(x, y) for x, y in pairs):
            return None
        self._singles[form] = single
        return plan


@contextlib.contextmanager
def _evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put the model in eval mode and autograd in a known state, and everything back afterwards.

    Yields:
        Nothing.
    """
    modes = {module: module.training for module in model.modules()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(_full_precision())
            if any(isinstance(module, nn.RNNBase) for module in modes):
                stack.enter_context(_without_cudnn())
        if "torch._dynamo" in sys.modules:
            # Hooks see nothing inside compiled code; importing the compiler only to say so would take seconds.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Keep CUDA from rounding fp32 products to TF32 (the default in convolutions), 1e-3 off.

    Yields:
        Nothing.
    """
    cudnn: Any = torch.backends.cudnn
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@contextlib.contextmanager
def _without_cudnn() -> Iterator[None]:
    """Leave cuDNN out: its recurrent layers refuse a backward in eval mode.

    Yields:
        Nothing.
    """
    cudnn: Any = torch.backends.cudnn
    before = cudnn.enabled
    try:
        cudnn.enabled = False
        yield
    finally:
        cudnn.enabled = before


def _mean(total: Tensor, count: int) -> Tensor:
    if total.is_contiguous():
        return total.div_(count)
    return torch.div(total, count, out=torch.empty(total.shape, dtype=total.dtype, device=total.device))


def _indexed(device: torch.device) -> tuple[str, int]:
    return device.type, device.index or 0


def _check(kind: str, power: str, examples: int | None, loss: Loss | None, chunk: int | None) -> None:
    if kind not in KINDS:
        raise ParamsError(f"kind '{kind}' is unknown; expected one of: {', '.join(KINDS)}")
    if power not in POWERS:
        raise ParamsError(f"power '{power}' is unknown; expected one of: {', '.join(POWERS)}")
    if loss is not None and kind == "expect":
        raise ParamsError(
            "kind 'expect' follows from the model's outputs and takes no loss; drop loss= or use 'label'"
        )
    for key, value in (("examples", examples), ("chunk", chunk)):
        if value is not None and value < 1:
            raise ParamsError(f"{key} is {value}; expected at least 1, or None")
