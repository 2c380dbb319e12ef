"""What joins one run to others that train the same model: asked by ``fit`` at every step."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor
from torch.optim import Optimizer


class Sync(Protocol):
    """The run's side of a distributed run (``pipeline.distributed.rounds`` is one)."""

    def begin(self, optimizer: Optimizer) -> None:
        """Start: the optimizer is made, no step is done."""
        ...

    def before_step(self) -> None:
        """θ's gradient is complete; the optimizer has not seen it."""
        ...

    def after_step(self, step: int, last: bool) -> bool:
        """θ is stepped and written; ``step`` steps are done, no more follow where ``last``.

        It may change the mask.

        Returns:
            True where all runs hold the same θ, so that the state may be saved and resumed from.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """What a resume needs beside θ, optimizer and buffers; asked for only after ``after_step`` was True."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what ``state`` gave; mask, θ, optimizer and buffers are back already."""
        ...
