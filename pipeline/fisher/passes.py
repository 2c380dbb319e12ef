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
        checks: (module, its argument, where the examples are), for comparing with a single example.
    """

    taps: dict[Edge, list[Handler]] = field(default_factory=dict)
    replays: list[Replay] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    routes: dict[str, str] = field(default_factory=dict)
    checks: list[tuple[str, Tensor, Layout]] = field(default_factory=list)

    def tap(self, edge: Edge, handler: Handler) -> None:
        """Have ``handler`` called with the gradient at ``edge`` of every backward pass."""
        self.taps.setdefault(edge, []).append(handler)

    def backward(self, root: Tensor, seeds: list[Tensor], graph: Graph) -> None:
        """Run one backward pass per seed, calling handlers as gradients arrive; no weight gradient is formed."""
        sinks = graph.sinks(self.taps)
        hooks = []
        for (node, number), handlers in self.taps.items():
            if (node, number) not in sinks:
                hooks.append(node.register_prehook(_prehook(number, handlers)))
        try:
            for i, seed in enumerate(seeds):
                edges = [GradientEdge(*edge) for edge in sinks]
                more = i + 1 < len(seeds)
                grads: tuple[Tensor | None, ...] = ()
                if edges:
                    grads = torch.autograd.grad(root, edges, seed, retain_graph=more, allow_unused=True)
                for edge, grad in zip(sinks, grads, strict=True):
                    if grad is not None:
                        for handler in self.taps[edge]:
                            handler(grad)
                for replay in self.replays:
                    replay.run()
        finally:
            for hook in hooks:
                hook.remove()


def _prehook(number: int, handlers: list[Handler]) -> Callable[[tuple[Tensor, ...]], None]:
    def hook(grads: tuple[Tensor, ...]) -> None:
        if grads[number] is not None:
            for handler in handlers:
                handler(grads[number])

    return hook
