"""θ's gradient, gathered tensor by tensor while a backward runs.

A new gradient of θ is zeros, so that a tensor which takes no part in the backward counts as zero. The first
gradient that comes for a stretch of it is therefore written there, not added: one kernel a tensor instead of two,
which on a GPU is most of what gathering costs.
"""

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from pipeline.training.embeddings import add_rows


class Gathering:
    """Adds the gradients of tensors to ``values.grad``, and knows which stretches of it are zeros still.

    Args:
        values: θ, [k].
    """

    def __init__(self, values: nn.Parameter) -> None:
        self._values = values
        self._total: TensorWeakRef | None = None  # the gradient begun here, as long as nobody else changes it
        self._version = 0  # of it, after the last write of ours
        self._written: set[int] = set()  # where the stretches begin that are no longer zeros

    def add(self, grad: Tensor, start: int, stop: int, coordinates: Tensor | None) -> None:
        """Add a tensor's gradient at its coordinates; call it without autograd.

        Args:
            grad: of any shape and layout.
            start: where the tensor's stretch of θ begins.
            stop: where it ends.
            coordinates: int64 [stop - start], row-major; None for all elements.
        """
        total = self._values.grad
        if total is None:
            total = self._values.grad = torch.zeros_like(self._values)
            self._total, self._version, self._written = TensorWeakRef(total), total._version, set()
        elif self._total is not None and (self._total() is not total or self._version != total._version):
            self._total = None
        target = total[start:stop]
        if grad.is_sparse:
            add_rows(target, grad, coordinates)
        else:
            flat = grad.reshape(-1)
            first = self._total is not None and start not in self._written
            if first and coordinates is not None and flat.dtype == total.dtype:
                torch.index_select(flat, 0, coordinates, out=target)
            else:
                flat = flat if coordinates is None else flat.index_select(0, coordinates)
                target.copy_(flat) if first else target.add_(flat)
        if self._total is not None:
            self._version = total._version
            self._written.add(start)
