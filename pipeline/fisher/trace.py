"""One forward, observed: which module was called with what, and the autograd graph that came of it."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from pipeline.fisher.batches import leaves_of

Edge = tuple[Node, int]
Consumer = tuple[Node, int, int]


@dataclass
class Call:
    """One call of a module.

    Attributes:
        name: the module's name.
        module: the module.
        args: its positional arguments, before any hook of its own.
        kwargs: its keyword arguments.
        grad: whether gradients were being recorded.
        versions: the version counter of each tensor argument at the time.
        sources: the graph nodes that made the tensor arguments.
        outputs: the tensors it returned, in order.
        edges: each output's place in the graph when it was returned (None if it needs no gradient); in-place
            changes afterwards do not move it.
        written: the version counter of each output at the time.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad: bool
    versions: list[int]
    sources: set[Node]
    outputs: list[Tensor] = field(default_factory=list)
    edges: list[Edge | None] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    finished: bool = False

    @property
    def inputs(self) -> list[Tensor]:
        """The tensor arguments, in order."""
        return list(_tensors((self.args, self.kwargs)))

    @property
    def untouched(self) -> bool:
        """Whether the arguments still hold what the module saw."""
        return self.versions == [x._version for x in self.inputs]


class Calls:
    """Records every call of a model's modules while it is active (a context manager)."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.calls: list[Call] = []
        self._open: list[Call] = []
        self._handles: list[Any] = []

    def __enter__(self) -> "Calls":
        for name, module in self.model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                before, after = self._hooks(name)
                # Ours comes first, to see the arguments before a user's own hook changes them, and last, to see
                # the output after.
                self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
                self._handles.append(module.register_forward_hook(after))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = list(_tensors((args, kwargs)))
            sources = {edge[0] for edge in map(edge_of, inputs) if edge}
            grad = torch.is_grad_enabled()
            call = Call(name, module, args, kwargs, grad, [x._version for x in inputs], sources)
            self.calls.append(call)
            self._open.append(call)

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            while self._open and (call := self._open.pop()):
                if call.module is module:
                    call.outputs = list(_tensors(output))
                    call.edges = [edge_of(x) for x in call.outputs]
                    call.written = [x._version for x in call.outputs]
                    call.finished = True
                    break

        return before, after

    def once(self) -> dict[str, Call]:
        """Pick the modules called exactly once, with gradients recorded.

        Returns:
            Name -> its call.
        """
        times: defaultdict[str, list[Call]] = defaultdict(list)
        for call in self.calls:
            times[call.name].append(call)
        return {name: c[0] for name, c in times.items() if len(c) == 1 and c[0].grad and c[0].finished}


class Graph:
    """The autograd graph under a root.

    Attributes:
        order: every node, each after all nodes it feeds on (children first, the root last).
        consumers: node -> (consumer, which of the consumer's inputs, which of the node's outputs), in no order.
        leaves: id of a leaf tensor -> its node.
        opaque: whether Python autograd functions are in it, which may hide further uses of parameters.
        reentrant: whether one of them is reentrant checkpointing, which supports nothing but a full ``backward``.
        selects: whether rows are selected by index, so that shapes may depend on the data.
    """

    def __init__(self, root: Tensor) -> None:
        self.order: list[Node] = []
        self.consumers: defaultdict[Node, list[Consumer]] = defaultdict(list)
        self.leaves: dict[int, Node] = {}
        self.opaque = False
        self.reentrant = False
        self.selects = False
        if root.grad_fn is not None:
            self._walk(root.grad_fn)

    def _walk(self, root: Node) -> None:
        seen = {root}
        stack: list[tuple[Node, Iterator[tuple[int, tuple[Node | None, int]]]]] = []
        stack.append((root, iter(enumerate(root.next_functions))))
        while stack:
            node, rest = stack[-1]
            for position, (child, number) in rest:
                if child is None:
                    continue
                self.consumers[child].append((node, position, number))
                if child not in seen:
                    seen.add(child)
                    stack.append((child, iter(enumerate(child.next_functions))))
                    break
            else:
                stack.pop()
                self.order.append(node)
                self._note(node)

    def _note(self, node: Node) -> None:
        variable = getattr(node, "variable", None)
        if variable is not None:
            self.leaves[id(variable)] = node
        elif isinstance(node, torch.autograd.function.BackwardCFunction):
            self.opaque = True
            self.reentrant |= node.name().startswith("CheckpointFunction")
        elif any(word in node.name() for word in ("Index", "Mask", "Gather", "Scatter", "Nonzero")):
            self.selects = True

    def __contains__(self, node: object) -> bool:
        return node in self.consumers or (bool(self.order) and node is self.order[-1])

    def uses(self, parameter: Tensor) -> list[Consumer]:
        """List the consumers of a parameter.

        Returns:
            (node, position among its inputs, 0) for every edge into the parameter's leaf.
        """
        leaf = self.leaves.get(id(parameter))
        return self.consumers[leaf] if leaf is not None else []

    def inside(self, call: Call) -> tuple[set[Node], list[int]] | None:
        """Find the part of the graph that a call made: everything between its outputs and its inputs.

        Returns:
            The nodes and the positions of the outputs that are used outside; or None if a node in between is used
            outside too, so that gradients at those outputs would not tell all (or would tell some of it twice).
        """
        nodes: set[Node] = set()
        ends = {edge: i for i, edge in enumerate(call.edges) if edge and edge[0] in self}
        stack = [edge[0] for edge in ends if edge[0] not in call.sources]
        while stack:
            node = stack.pop()
            if node not in nodes:
                nodes.add(node)
                stack += [n for n, _ in node.next_functions if n is not None and n not in call.sources]
        used: list[int] = []
        for node in nodes:
            if id(getattr(node, "variable", None)) in self.leaves:
                continue
            for number in {c[2] for c in self.consumers[node]} or {0}:
                consumers = [c for c in self.consumers[node] if c[2] == number]
                outside = not consumers or any(c[0] not in nodes for c in consumers)
                if outside and ((node, number) not in ends or any(c[0] in nodes for c in consumers)):
                    return None
                if outside:
                    used.append(ends[node, number])
        return nodes, sorted(used)

    def sinks(self, edges: Mapping[Edge, Any]) -> list[Edge]:
        """Pick the edges below which there are no others; asking autograd for their gradients visits all others.

        Returns:
            The lowest edges.
        """
        marked = {node for node, _ in edges}
        below: set[Node] = set()
        for node in self.order:
            if any(child in marked or child in below for child, _ in node.next_functions):
                below.add(node)
        return [edge for edge in edges if edge[0] not in below]


def edge_of(x: Tensor) -> Edge | None:
    """Locate a tensor in the autograd graph.

    Returns:
        (node, which of its outputs), or None for a tensor without gradient.
    """
    if not x.requires_grad:
        return None
    edge = get_gradient_edge(x)
    return edge.node, edge.output_nr


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in leaves_of(tree) if isinstance(leaf, Tensor))
