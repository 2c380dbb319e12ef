"""Backward passes that hand out gradients on their way and form no weight gradient."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from pipeline.fisher.fallback import Replay
from pipeline.fisher.layout import Layout
from pipeline.fisher.trace import Edge, Graph

Handler = Callable[[Tensor], None]


@dataclass
class Plan:
    """Handlers of gradients at places in the graph, replays, and what is left for the whole model.

    Attributes:
        taps: place in the graph -> what to do with the gradient there.
        replays: modules to run again.
        whole: names whose scores take the whole model, one example at a time.
        routes: name -> its way: "rule", "lift", "replay <module>", "whole" or "unused".
        checks: (module, which argument, its value, where the examples are), for comparing with a single example.
        more: whether another backward pass follows.
    """

    taps: dict[Edge, list[Handler]] = field(default_factory=dict)
    replays: list[Replay] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    routes: dict[str, str] = field(default_factory=dict)
    checks: list[tuple[str, int, Tensor, Layout]] = field(default_factory=list)
    more: bool = False

    def tap(self, edge: Edge, handler: Handler) -> None:
        """Have ``handler`` called with the gradient at ``edge`` of every backward pass."""
        self.taps.setdefault(edge, []).append(handler)

    def check(self, name: str, i: int, x: Tensor, layout: Layout) -> None:
        """Ask for argument ``i`` of a module to be compared; once for what several read, as queries and keys."""
        if layout.size > 1 and not any(
            x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride() and layout == other
            for _, _, y, other in self.checks
        ):
            self.checks.append((name, i, x, layout))

    def backward(self, root: Tensor, seeds: list[Tensor], graph: Graph) -> None:
        """Run one backward pass per seed, calling handlers as gradients arrive; no weight gradient is formed.

        The last pass lets go of each handler, and the layer input it holds, as autograd lets go of its own.
        """
        self.checks.clear()
        sinks = graph.sinks(self.taps)
        hooks = [
            node.register_prehook(self._prehook((node, number)))
            for node, number in self.taps
            if (node, number) not in sinks
        ]
        try:
            for i, seed in enumerate(seeds):
                self.more = i + 1 < len(seeds)
                edges = [GradientEdge(*edge) for edge in sinks]
                grads: tuple[Tensor | None, ...] = ()
                if edges:
                    grads = torch.autograd.grad(root, edges, seed, retain_graph=self.more, allow_unused=True)
                for edge, grad in zip(sinks, grads, strict=True):
                    self._handle(edge, grad)
                for replay in self.replays:
                    replay.run()
        finally:
            for hook in hooks:
                hook.remove()

    def _prehook(self, edge: Edge) -> Callable[[tuple[Tensor, ...]], None]:
        return lambda grads: self._handle(edge, grads[edge[1]])

    def _handle(self, edge: Edge, grad: Tensor | None) -> None:
        handlers = self.taps[edge]
        if grad is not None:
            for handler in handlers:
                handler(grad)
        if not self.more:
            handlers.clear()
