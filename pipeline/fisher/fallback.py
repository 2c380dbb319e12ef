"""The exact ways that work for any module: run it again, or the whole model, one example at a time."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.fisher.batches import leaves_of, map_leaves, rows_of
from pipeline.fisher.layout import Layout
from pipeline.fisher.objective import Objective
from pipeline.fisher.products import Work


def close(x: Tensor, y: Tensor) -> bool:
    """Compare two computations of one thing, up to the rounding of another batch size.

    Returns:
        Whether they agree: integers exactly, floats to a thousandth (half precision: a twentieth) of the largest.
    """
    if x.shape != y.shape:
        return False
    if not x.is_floating_point() or not x.numel():
        return bool(torch.equal(x, y))
    tolerance = 5e-2 if torch.finfo(x.dtype).bits == 16 else 1e-3
    off, scale = (x - y).abs_().max(), y.abs().max()
    if not bool(off.isfinite()):
        # Equal infinities, as in masks, have no difference; any other NaN fails the comparison.
        off = torch.where(x == y, torch.zeros_like(x), x - y).abs_().max()
        scale = torch.where(x.isfinite(), x, torch.zeros_like(x)).abs_().max()
    return bool(off <= tolerance * scale)


class Replay:
    """Runs one module again per example, on the arguments it had, against the gradients at its results.

    Whatever the module does inside, the parameter gradients of its own output are exact. A result that differs
    from the recorded one, or an error, discards everything it added: ``failed`` is then true.
    """

    def __init__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: list[Layout | None],
        parameters: Mapping[str, Tensor],
        scores: Mapping[str, Tensor],
        size: int,
        work: Work,
    ) -> None:
        self.module = module
        self.args, self.kwargs = map_leaves((args, kwargs), lambda x: x.detach() if isinstance(x, Tensor) else x)
        self.inputs = inputs
        self.parameters = parameters
        self.scores = scores
        self.totals = {name: torch.zeros_like(scores[name]) for name in parameters}
        self.size = size
        self.work = work
        self.outputs: dict[int, tuple[Tensor, Layout]] = {}
        self.gradients: dict[int, Tensor] = {}
        self.failed = False

    def output(self, i: int, value: Tensor, layout: Layout) -> Callable[[Tensor], None]:
        """Announce result ``i`` of the module.

        Returns:
            What to call with the gradient at that result.
        """
        self.outputs[i] = value, layout

        def keep(g: Tensor) -> None:
            self.gradients[i] = g.detach()

        return keep

    def run(self) -> None:
        """Add the scores of one backward pass, all examples."""
        if self.gradients and not self.failed:
            try:
                self.failed = not all(self._example(n) for n in range(self.size))
            except Exception:  # any error of the user's module on one example alone: the whole model decides
                self.failed = True
        self.gradients.clear()

    def finish(self) -> list[str]:
        """Add the sums to the scores, once all passes are done.

        Returns:
            The names that must take another way: all of them if the replay failed, else none.
        """
        if self.failed:
            return list(self.parameters)
        for name, total in self.totals.items():
            self.scores[name].add_(total)
        return []

    def _example(self, n: int) -> bool:
        layouts = iter(self.inputs)

        def cut(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            layout = next(layouts)
            return leaf if layout is None else layout.part(leaf, n)

        args, kwargs = map_leaves((self.args, self.kwargs), cut)
        with torch.enable_grad():
            results = [x for x in leaves_of(self.module(*args, **kwargs)) if isinstance(x, Tensor)]
        roots, seeds = [], []
        for i, g in self.gradients.items():
            value, layout = self.outputs[i]
            if not close(layout.part(value, n), results[i].detach()):
                return False
            roots.append(results[i])
            seeds.append(layout.part(g, n))
        grads = torch.autograd.grad(roots, list(self.parameters.values()), seeds, allow_unused=True)
        _add(self.totals, dict(zip(self.parameters, grads, strict=True)), self.work)
        return True


def add_whole(
    model: nn.Module,
    objective: Objective,
    batch: Any,
    size: int,
    parameters: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    work: Work,
    *,
    hidden: bool = False,
) -> None:
    """Add the scores of ``parameters`` by the whole model, one example at a time.

    Args:
        model: the model.
        objective: what to differentiate.
        batch: B examples.
        size: B.
        parameters: which scores to add, by name.
        scores: where to add them.
        work: the power.
        hidden: a Python autograd function uses parameters out of autograd's sight (reentrant checkpointing), which
            only a full ``backward`` supports; it runs on a copy, to leave the model's gradients and hooks alone.
    """
    totals = {name: torch.zeros_like(scores[name]) for name in parameters}
    if hidden:
        model = copy.deepcopy(model)
        copied = dict(model.named_parameters())
        parameters = {name: copied[name] for name in parameters}
    for n in range(size):
        example = rows_of(batch, n, n + 1, size)
        with torch.enable_grad():
            root = objective.root(model, example, 1)
        seeds = objective.seeds(root, example)
        for i, seed in enumerate(seeds):
            more = i + 1 < len(seeds)
            if hidden:
                model.zero_grad(set_to_none=True)
                root.backward(seed, retain_graph=more)
                grads: Iterable[Tensor | None] = [p.grad for p in parameters.values()]
            elif root.requires_grad:
                wanted = list(parameters.values())
                grads = torch.autograd.grad(root, wanted, seed, retain_graph=more, allow_unused=True)
            else:
                continue
            _add(totals, dict(zip(parameters, grads, strict=True)), work)
    for name, total in totals.items():
        scores[name].add_(total)


def _add(totals: Mapping[str, Tensor], grads: Mapping[str, Tensor | None], work: Work) -> None:
    for name, g in grads.items():
        if g is not None:
            dense = g.to_dense() if g.is_sparse else g
            totals[name].add_(work.psi(dense.to(totals[name].dtype)))
