"""θ's gradient, gathered tensor by tensor while a backward runs.

A new gradient of θ is zeros, so that a tensor which takes no part in the backward counts as zero. The first
gradient that comes for a stretch of it is therefore written there, not added: one kernel a tensor instead of two,
which on a GPU is most of what gathering costs. There the gradients of small tensors also wait for each other, at
the latest until the backward ends, and are gathered together (``pipeline.training.bunches``).
"""

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils.weak import TensorWeakRef

from pipeline.training.bunches import TOGETHER, Bunch, Stretch
from pipeline.training.embeddings import add_rows


@dataclass
class _Waiting:
    """Gradients of one backward that wait for each other."""

    stretches: list[Stretch] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    size: int = 0


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
        self._waiting: dict[int, _Waiting] = {}  # of each backward that runs: one may run inside another
        self._bunches: dict[tuple[int, ...], Bunch] = {}  # by where the stretches begin

    def forget(self) -> None:
        """Forget what is known of the tensors: the mask changes."""
        self._bunches.clear()
        self._waiting.clear()

    def add(self, grad: Tensor, stretch: Stretch, *, together: bool) -> None:
        """Add a tensor's gradient at its coordinates: to be called in a backward, without autograd.

        Args:
            grad: of any shape and layout. It is there in ``values.grad`` once the backward has ended.
            stretch: which of its elements go where.
            together: whether it may wait for others.
        """
        backward = torch._C._current_graph_task_id() if together and not grad.is_sparse else -1
        if backward < 0:
            self._add(self._begun(), grad, stretch)
            return
        waiting = self._waiting.get(backward)
        if waiting is None:
            self._begun()
            waiting = self._waiting[backward] = _Waiting()
            Variable._execution_engine.queue_callback(partial(self._end, backward))
        elif waiting.size + stretch[3] > TOGETHER:
            self._release(waiting)
            waiting = self._waiting[backward] = _Waiting()
        waiting.stretches.append(stretch)
        waiting.grads.append(grad)
        waiting.size += stretch[3]

    def _begun(self) -> Tensor:
        """The gradient of θ, made where there is none; note whether someone else has changed it."""
        total = self._values.grad
        if total is None:
            total = self._values.grad = torch.zeros_like(self._values)
            self._total, self._version, self._written = TensorWeakRef(total), total._version, set()
            self._waiting.clear()  # of a backward that was broken off
        elif self._total is not None and (self._total() is not total or self._version != total._version):
            self._total = None
        return total

    def _add(self, total: Tensor, grad: Tensor, stretch: Stretch) -> None:
        """Add one gradient."""
        start, stop, coordinates, _ = stretch
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

    def _end(self, backward: int) -> None:
        """The backward has ended: nothing more will come."""
        waiting = self._waiting.pop(backward, None)
        if waiting is not None:
            self._release(waiting)

    @torch.no_grad()
    def _release(self, waiting: _Waiting) -> None:
        """Gather what waits."""
        total, starts = self._begun(), {stretch[0] for stretch in waiting.stretches}
        fresh = self._total is not None and self._written.isdisjoint(starts)
        pairs = list(zip(waiting.stretches, waiting.grads, strict=True))
        if part := [pair for pair in pairs if pair[0][2] is not None]:
            key = tuple(stretch[0] for stretch, _ in part)
            if key not in self._bunches:
                self._bunches[key] = Bunch([stretch for stretch, _ in part], total.device)
            self._bunches[key].gather([grad for _, grad in part], total, add=not fresh)
        if whole := [pair for pair in pairs if pair[0][2] is None]:
            targets = [total[start:stop] for (start, stop, *_), _ in whole]
            flats = [grad.reshape(-1) for _, grad in whole]
            (torch._foreach_copy_ if fresh else torch._foreach_add_)(targets, flats)
        if self._total is not None:
            self._version = total._version
            self._written.update(starts)
