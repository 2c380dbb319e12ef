"""Sums of squared (or absolute) per-example outer products, the arithmetic under every weight's rule.

For a weight [O, I] that saw inputs a and output gradients g, example n's gradient is G_n = Σ_t g_ntᵀ a_nt, and the
scores gain Σ_n ψ(G_n) with ψ the square or the absolute value. All G_n together would take B·O·I floats; each
form below holds far less.

Shape legend: B examples, T positions, O outputs, I inputs, P pairs of positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows and columns of a tile of G_n on a CPU. It and its accumulator are written once per example, so they should
# stay in cache, yet small tiles make slow matrix products: 384 was the best of 32 to 1,536 (Zen 3, 512 kB of L2).
TILE = 384
# Up to this many positions, one product over all pairs of positions beats B small products (SPEED.md).
FEW = 8


@dataclass(frozen=True)
class Work:
    """How to work.

    Attributes:
        power: "square" or "absolute".
        chunk: bytes of temporary tensors that a rule may hold, beyond what a single example needs.
    """

    power: str
    chunk: int

    def psi(self, x: Tensor) -> Tensor:
        """Square or absolute value, elementwise.

        Returns:
            A new tensor.
        """
        return x.square() if self.power == "square" else x.abs()

    def groups(self, size: int, bytes_each: int) -> Iterator[slice]:
        """Cut ``size`` examples into groups whose temporaries fit the chunk, one example at least.

        Yields:
            Slices of the examples.
        """
        step = max(1, min(size, self.chunk // max(1, bytes_each)))
        for start in range(0, size, step):
            yield slice(start, min(start + step, size))


def add_outer(g_BTO: Tensor, a_BTI: Tensor, into_OI: Tensor, work: Work) -> None:
    """Add Σ_n ψ(g_nᵀ a_n) to ``into_OI``, in its dtype."""
    positions, outputs, inputs = g_BTO.shape[1], g_BTO.shape[2], a_BTI.shape[2]
    g_BTO, a_BTI = g_BTO.to(into_OI.dtype), a_BTI.to(into_OI.dtype)
    if positions == 1:
        # A product of one term: its square is the product of squares.
        into_OI.addmm_(work.psi(g_BTO[:, 0]).t(), work.psi(a_BTI[:, 0]))
    elif positions == 0:
        return
    elif g_BTO.device.type != "cpu":
        _batched(g_BTO, a_BTI, into_OI, work)
    elif work.power == "square" and positions <= FEW:
        _pairs(g_BTO, a_BTI, into_OI, work)
    elif outputs * inputs <= 4096:
        _batched(g_BTO, a_BTI, into_OI, work)
    else:
        _tiled(g_BTO, a_BTI, into_OI, work)


def _tiles(into_OI: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Cut a weight into tiles of at most TILE x TILE elements.

    Yields:
        The rows, the columns, and that part of ``into_OI``.
    """
    outputs, inputs = into_OI.shape
    width = min(inputs, TILE if outputs >= TILE else TILE * TILE // outputs)
    height = min(outputs, max(1, TILE * TILE // width))
    for top in range(0, outputs, height):
        for left in range(0, inputs, width):
            rows, columns = slice(top, top + height), slice(left, left + width)
            yield rows, columns, into_OI[rows, columns]


def _tiled(g_BTO: Tensor, a_BTI: Tensor, into_OI: Tensor, work: Work) -> None:
    space = into_OI.new_empty(2, min(into_OI.numel(), TILE * TILE))
    for rows, columns, corner in _tiles(into_OI):
        # The last tiles are smaller; viewed from the start of the buffers they stay contiguous.
        product, total = (buffer[: corner.numel()].view(corner.shape) for buffer in space)
        total.zero_()
        for g_TO, a_TI in zip(g_BTO[:, :, rows].unbind(0), a_BTI[:, :, columns].unbind(0), strict=True):
            torch.mm(g_TO.t(), a_TI, out=product)
            if work.power == "square":
                total.addcmul_(product, product)
            else:
                total.add_(product.abs_())
        # Summing a batch apart from the running total keeps rounding from growing with the number of examples.
        corner.add_(total)


def _batched(g_BTO: Tensor, a_BTI: Tensor, into_OI: Tensor, work: Work) -> None:
    order = 2 if work.power == "square" else 1
    for group in work.groups(len(g_BTO), into_OI.numel() * into_OI.element_size()):
        products = torch.bmm(g_BTO[group].transpose(1, 2), a_BTI[group])
        if len(products) == 1:
            into_OI.add_(work.psi(products[0]))
        else:
            # The norm reads the products once and writes [O, I]: no second [B, O, I] of squares.
            norm = torch.linalg.vector_norm(products, order, dim=0)
            into_OI.add_(norm.square_() if order == 2 else norm)


def _pairs(g_BTO: Tensor, a_BTI: Tensor, into_OI: Tensor, work: Work) -> None:
    """Expand the square: G² = Σ_{s≤t} (2 - [s=t]) g_s g_t a_s a_t, one matrix product over all examples and pairs.

    The expansion cancels where G_n is small against its terms, so a tile whose rounding error could matter
    beside its largest score is computed the other way.
    """
    size, positions, outputs = g_BTO.shape
    inputs = a_BTI.shape[2]
    pairs = positions * (positions + 1) // 2
    space = into_OI.new_empty(min(into_OI.numel(), TILE * TILE))
    for group in work.groups(size, pairs * (outputs + inputs) * into_OI.element_size()):
        g, a = g_BTO[group], a_BTI[group]
        g_PO = _pair_products(g, 2.0).view(-1, outputs)
        a_PI = _pair_products(a, 1.0).view(-1, inputs)
        g_most_BO, a_most_BI = g.abs().sum(1).square_(), a.abs().sum(1).square_()
        for rows, columns, corner in _tiles(into_OI):
            total = space[: corner.numel()].view(corner.shape)
            most = float(torch.mm(g_most_BO[:, rows].t(), a_most_BI[:, columns], out=total).max())
            torch.mm(g_PO[:, rows].t(), a_PI[:, columns], out=total)
            # eps · most is the order of the error; 100 · eps in fp32 is a tenth of what CORRECTNESS 3 allows.
            if most <= 100 * float(total.max()):
                corner.add_(total.clamp_(min=0))
            else:
                _tiled(g[:, :, rows], a[:, :, columns], corner, work)


def _pair_products(x_BTD: Tensor, weight: float) -> Tensor:
    """Multiply positions s ≤ t with each other; ``weight`` times, where s < t.

    Returns:
        [B, P, D], ordered by the distance t - s.
    """
    size, positions, features = x_BTD.shape
    products = x_BTD.new_empty(size, positions * (positions + 1) // 2, features)
    torch.mul(x_BTD, x_BTD, out=products[:, :positions])
    start = positions
    for distance in range(1, positions):
        stop = start + positions - distance
        torch.mul(x_BTD[:, distance:], x_BTD[:, :-distance], out=products[:, start:stop])
        start = stop
    if weight != 1 and positions > 1:
        products[:, positions:].mul_(weight)
    return products
