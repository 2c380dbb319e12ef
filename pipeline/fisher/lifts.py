"""Parameters without examples in their own gradient: taken where they first meet the examples.

A bias added to [B, T, D], position embeddings [1, T, D], a class token expanded to [B, 1, D], a scale per channel:
for each, autograd sums over the examples before the parameter's gradient exists. One step earlier they are apart.

Shape legend: B examples.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.fisher.layout import Layout, layout_of
from pipeline.fisher.trace import Consumer, Edge
from pipeline.parameters import Shape

Use = tuple[str, Shape]


@dataclass(frozen=True)
class Lift:
    """An operation y = x + p, x · p or expand(p), with p shared by all examples and y not.

    Attributes:
        edge: the place of y in the graph.
        layout: where the examples are in y.
        shape: the shape of p.
        factor: x for a product, else None.
    """

    edge: Edge
    layout: Layout
    shape: Shape
    factor: Tensor | None

    def gradients(self, g: Tensor) -> Tensor:
        """Turn the gradient at y into each example's gradient at p.

        Returns:
            [B, *shape].
        """
        each = self.layout.split(g)
        if self.factor is not None:
            each = each * self.layout.split(self.factor.expand(g.shape))
        missing = each.ndim - 1 - len(self.shape)
        shared = [d for d in range(1, each.ndim) if d <= missing or self.shape[d - 1 - missing] == 1]
        if shared:
            each = each.sum(shared, keepdim=True)
        return each.reshape(len(each), *self.shape)


def use_of(uses: list[Consumer]) -> Use | None:
    """Name the one operation in ``uses``.

    Returns:
        Its name and the shape of its output; None unless it is one, with one output.
    """
    if len(uses) != 1:
        return None
    node: Any = uses[0][0]
    metadata = node._input_metadata
    return (node.name(), tuple(metadata[0].shape)) if len(metadata) == 1 else None


def lift_of(uses: list[Consumer], single: Use | None, shape: Shape, size: int) -> Lift | None:
    """Lift a tensor of ``shape``, the same for all examples, to its only use.

    Args:
        uses: its consumers in the graph of the batch.
        single: its use when one example was run alone.
        shape: its shape.
        size: B.

    Returns:
        The lift, or None if the use is another operation, or has no examples.
    """
    use = use_of(uses)
    if use is None or single is None or use[0] != single[0]:
        return None
    node: Any = uses[0][0]
    position = uses[0][1]
    layout = layout_of(use[1], single[1], size)
    if layout is None or math.prod(use[1]) == 0 or len(use[1]) < len(shape):
        return None
    if layout.rows > 1:  # whose rows come in which order could only be told from values, which are not at hand
        return None
    own = layout.dim - (len(use[1]) - len(shape))
    if size > 1 and own >= 0 and shape[own] != 1:
        return None
    factor = None
    if use[0] == "AddBackward0":
        if position == 1 and node._saved_alpha != 1:
            return None
    elif use[0] == "MulBackward0":
        try:
            factor = (node._saved_other if position == 0 else node._saved_self).detach()
        except RuntimeError:  # changed in place since
            return None
    elif use[0] != "ExpandBackward0":
        return None
    return Lift((node, 0), layout, shape, factor)
