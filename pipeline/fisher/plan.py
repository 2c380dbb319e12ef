"""Which exact way each parameter's score takes, decided anew from every forward's calls and graph.

A way is taken only where it is known to be exact:

* rule: the parameter's only use is the one call of a module that has a rule (``layers.py``);
* lift: its only use is to be added, multiplied or expanded into something that has examples (``lifts.py``);
* replay: all its uses are inside one call of one module, which is run again per example (``fallback.py``);
* whole: the whole model, one example at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.fisher.batches import leaves_of
from pipeline.fisher.fallback import Replay
from pipeline.fisher.layers import Rule, takes_planes
from pipeline.fisher.layout import Layout, layout_of
from pipeline.fisher.lifts import Lift, lift_of, use_of
from pipeline.fisher.passes import Handler, Plan
from pipeline.fisher.products import Work
from pipeline.fisher.trace import Call, Calls, Graph
from pipeline.parameters import Shape

PLAIN = (Tensor, bool, int, float, str, bytes, type(None), torch.dtype, torch.device, slice)


@dataclass
class Single:
    """Shapes seen while one example went through the model alone.

    Attributes:
        inputs: module -> shapes of its tensor arguments, for modules called once.
        outputs: module -> shapes of the tensors it returned.
        uses: parameter or module name -> the node that alone uses it (its output), and that node's output shape.
    """

    inputs: dict[str, list[Shape]]
    outputs: dict[str, list[Shape]]
    uses: dict[str, tuple[str, Shape] | None]

    @classmethod
    def of(cls, calls: Calls, graph: Graph, parameters: Mapping[str, Tensor]) -> "Single":
        """Note the shapes of a forward.

        Returns:
            The shapes.
        """
        once = calls.once()
        uses = {name: use_of(graph.uses(p)) for name, p in parameters.items()}
        for name, call in once.items():
            if len(call.edges) == 1 and (edge := call.edges[0]) and edge[0] in graph:
                uses["output of " + name] = use_of(graph.consumers[edge[0]])
        inputs = {name: [tuple(x.shape) for x in call.inputs] for name, call in once.items()}
        outputs = {name: [tuple(x.shape) for x in call.outputs] for name, call in once.items()}
        return cls(inputs, outputs, uses)


class Planner:
    """Plans for one model.

    Attributes:
        parameters: the scored parameters by name.
        scores: where their scores are summed.
        rules: module name -> rule, for modules with their standard behaviour.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, Tensor], rules: Mapping[str, Rule], work: Work
    ) -> None:
        self.parameters = parameters
        self.rules = rules
        self.work = work
        self.names = {id(p): name for name, p in parameters.items()}
        self.owners: dict[str, list[str]] = {name: [] for name in parameters}
        for module_name, module in model.named_modules():
            for p in module._parameters.values():
                if id(p) in self.names:
                    self.owners[self.names[id(p)]].append(module_name)

    def plan(self, calls: Calls, graph: Graph, single: Single, size: int, scores: Mapping[str, Tensor]) -> Plan:
        """Assign a way to every parameter.

        Returns:
            The plan for this forward.
        """
        plan = Plan()
        once = calls.once()
        blind = {call.name for call in calls.calls if not call.grad} if graph.opaque else set()
        for name, p in self.parameters.items():
            if graph.opaque and (not graph.uses(p) or blind.intersection(self.owners[name])):
                # A Python autograd function may use it out of sight, as reentrant checkpointing does.
                plan.whole.append(name)
                plan.routes[name] = "whole"
            elif not graph.uses(p):
                plan.routes[name] = "unused"
        for name, rule in self.rules.items():
            if name in once:
                self._by_rule(plan, rule, once[name], graph, single, size, scores)
        for name, p in self.parameters.items():
            if name in plan.routes:
                continue
            lift = lift_of(graph.uses(p), single.uses.get(name), tuple(p.shape), size)
            if lift is not None:
                plan.tap(lift.edge, _lifted(lift, scores[name], self.work))
                plan.routes[name] = "lift"
        replays: dict[str, list[str]] = {}
        for name in self.parameters:
            if name in plan.routes:
                continue
            module = self._enclosing(name, once, graph, single, size) if size > 1 else None
            if module is None:
                plan.whole.append(name)
                plan.routes[name] = "whole"
            else:
                replays.setdefault(module, []).append(name)
                plan.routes[name] = f"replay {module}"
        for module, names in replays.items():
            self._replay(plan, once[module], names, graph, single, size, scores)
        return plan

    def _by_rule(
        self,
        plan: Plan,
        rule: Rule,
        call: Call,
        graph: Graph,
        single: Single,
        size: int,
        scores: Mapping[str, Tensor],
    ) -> None:
        module = call.module
        names = {
            local: self.names[id(p)]
            for local in ("weight", "bias")
            if id(p := module._parameters.get(local)) in self.names
            and self.names[id(p)] not in plan.routes
            and _used_once(graph, p)
        }
        if not names or call.name not in single.inputs or len(call.edges) != 1 or not call.untouched:
            return
        edge, leaves = call.edges[0], list(leaves_of((call.args, call.kwargs)))
        if len(leaves) != 1 or not isinstance(leaves[0], Tensor) or edge is None or edge[0] not in graph:
            return
        a, out = leaves[0].detach(), call.outputs[0]
        in_shape, out_shape = single.inputs[call.name][0], single.outputs[call.name][0]
        layout = layout_of(tuple(a.shape), in_shape, size)
        into = {local: scores[name] for local, name in names.items()}
        handler: Handler
        if (planes := takes_planes(module)) is not None:
            space = a.ndim - 2
            if space < 0 or planes not in (-1, space) or len(a) != size or layout != Layout(0, 1, size):
                return
            handler = lambda g: rule(module, a, g, into, self.work)  # noqa: E731
        elif layout is not None and layout == layout_of(tuple(out.shape), out_shape, size):
            where = layout
            if size > 1 and where.dim >= a.ndim - _features(module):
                return
            handler = lambda g: rule(module, where.split(a), where.split(g), into, self.work)  # noqa: E731
        else:
            shape = tuple(out.shape)
            lift = lift_of(graph.consumers[edge[0]], single.uses.get("output of " + call.name), shape, size)
            if tuple(a.shape) != in_shape or shape != out_shape or lift is None:
                return
            # The same for every example, as position embeddings [1, T, D] are: autograd sums over the examples
            # before it gets here, so the gradient is taken one step earlier.
            lifted, a_each = lift, a.unsqueeze(0).expand(size, *a.shape)
            handler = lambda g: rule(module, a_each, lifted.gradients(g), into, self.work)  # noqa: E731
            edge = lift.edge
        plan.tap(edge, handler)
        plan.routes.update(dict.fromkeys(names.values(), "rule"))
        if layout is not None:
            plan.check(call.name, 0, a, layout)

    def _enclosing(
        self, name: str, once: Mapping[str, Call], graph: Graph, single: Single, size: int
    ) -> str | None:
        paths = [owner.split(".") if owner else [] for owner in self.owners[name]]
        path = paths[0]
        for other in paths[1:]:
            while path != other[: len(path)]:
                path = path[:-1]
        while path:
            module = ".".join(path)
            if module in once and self._replayable(name, once[module], graph, single, size):
                return module
            path = path[:-1]
        return None

    def _replayable(self, name: str, call: Call, graph: Graph, single: Single, size: int) -> bool:
        """Check that all uses are inside the call, and that its arguments and results can be cut by example.

        Returns:
            Whether running the module again per example gives this parameter's gradients.
        """
        plain = all(isinstance(leaf, PLAIN) for leaf in leaves_of((call.args, call.kwargs)))
        if not plain or not call.untouched or call.name not in single.inputs:
            return False
        inside = graph.inside(call)
        if inside is None or not all(node in inside[0] for node, _, _ in graph.uses(self.parameters[name])):
            return False
        ones = single.inputs[call.name]
        if len(ones) != len(call.inputs) or len(single.outputs[call.name]) != len(call.outputs):
            return False
        for x, one in zip(call.inputs, ones, strict=True):
            if tuple(x.shape) != one and layout_of(tuple(x.shape), one, size) is None:
                return False
        for i in inside[1]:
            x, one = call.outputs[i], single.outputs[call.name][i]
            if layout_of(tuple(x.shape), one, size) is None or x._version != call.written[i]:
                return False
        return bool(inside[1])

    def _replay(
        self,
        plan: Plan,
        call: Call,
        names: list[str],
        graph: Graph,
        single: Single,
        size: int,
        scores: Mapping[str, Tensor],
    ) -> None:
        inside = graph.inside(call)
        assert inside is not None
        inputs = [
            layout_of(tuple(x.shape), one, size)
            for x, one in zip(call.inputs, single.inputs[call.name], strict=True)
        ]
        parameters = {name: self.parameters[name] for name in names}
        for i, (x, layout) in enumerate(zip(call.inputs, inputs, strict=True)):
            if layout is not None:
                plan.check(call.name, i, x.detach(), layout)
        replay = Replay(call.module, call.args, call.kwargs, inputs, parameters, scores, size, self.work)
        for i in inside[1]:
            out, edge = call.outputs[i], call.edges[i]
            layout = layout_of(tuple(out.shape), single.outputs[call.name][i], size)
            assert edge is not None and layout is not None
            plan.tap(edge, replay.output(i, out.detach(), layout))
        plan.replays.append(replay)


def _features(module: nn.Module) -> int:
    """Count the trailing dimensions of the argument that are features, not positions.

    Returns:
        The number of dimensions.
    """
    if isinstance(module, nn.Embedding):
        return 0
    return len(module.normalized_shape) if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) else 1


def _lifted(lift: Lift, into: Tensor, work: Work) -> Handler:
    def handler(g: Tensor) -> None:
        into.add_(work.psi(lift.gradients(g).to(into.dtype)).sum(0))

    return handler


def _used_once(graph: Graph, parameter: Any) -> bool:
    """Check that nothing but one operation uses a parameter, be it through a transpose or a cast.

    Returns:
        Whether that is so.
    """
    uses = graph.uses(parameter)
    while len(uses) == 1 and uses[0][0].name() in ("TBackward0", "TransposeBackward0", "ToCopyBackward0"):
        uses = graph.consumers[uses[0][0]]
    return len(uses) == 1
