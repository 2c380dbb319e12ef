"""The first implementation's leak, reproduced: the gradient is masked, weight decay and momentum are not.

There every parameter was given to the optimizer and only its gradient multiplied by the mask. So each "frozen"
weight decayed, a coordinate that left the mask went on by its momentum, and the optimizer's state was dense. This
serves to show what that costs; nothing else should use it. Source: issue 5.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.masks.mask import Mask
from pipeline.training.masked import MaskedParameters, Segment, fitting_parameters


class LeakyParameters(MaskedParameters):
    """All values of the model as θ, of which only those at a mask receive gradients.

    Args:
        model: as in ``MaskedParameters``.
        mask: the coordinates that gradients reach.

    Attributes:
        mask: every parameter of the mask's index: what the optimizer may change, and does.

    Raises:
        MismatchError: if the mask belongs to another model; names the first tensor that differs.
        ModelError: if the parameters lie on several devices, or are no real floats.
    """  # noqa: DOC502 - raised by what it calls

    def __init__(self, model: nn.Module, mask: Mask) -> None:
        self._chosen = mask
        self._reached: dict[str, Tensor | None] = {}
        super().__init__(model, Mask.covering(mask.index, list(mask.index)))
        self._reach(mask)

    @property
    def chosen(self) -> Mask:
        """The coordinates that gradients reach."""
        return self._chosen

    def remask_(self, mask: Mask, optimizer: Optimizer | None = None) -> None:
        """Let gradients reach other coordinates from now on; the optimizer's state stays, stale momentum included.

        Args:
            mask: the new coordinates, of the same model.
            optimizer: not looked at.
        """
        self._check_open()
        fitting_parameters(self.model, mask)
        self._reach(mask)

    def _reach(self, mask: Mask) -> None:
        self._chosen = mask
        self._reached = {
            name: None if mask.whole(name) else mask.indices[name].to(self.values.device) for name in mask.index
        }

    def _collector(self, part: Segment) -> Callable[[Tensor], None]:
        collect = super()._collector(part)
        name = next(n for n, segment in self.segments.items() if segment is part)

        @torch.no_grad()
        def collect_chosen(parameter: Tensor) -> None:
            grad, at = parameter.grad, self._reached[name]
            if grad is not None and at is not None:
                flat = (grad.to_dense() if grad.is_sparse else grad).reshape(-1)
                parameter.grad = torch.zeros_like(flat).index_copy_(0, at, flat[at]).reshape(parameter.shape)
            collect(parameter)

        return collect_chosen
