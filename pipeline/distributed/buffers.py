"""The buffers of the workers' models, merged: BatchNorm's statistics pooled, counters copied.

W workers that saw as much data each hold running means m_r and variances v_r. Together they saw

    m = (1/W) Σ_r m_r                v = (1/W) Σ_r v_r + (1/W) Σ_r (m_r - m)²

The mean of the variances alone would be too small. Both are computed on differences to the last merge, which are
small, so that nothing cancels. Other floating-point buffers are averaged. Integers and booleans, such as
``num_batches_tracked``, are rank 0's: a counter is never averaged. Buffers that no checkpoint keeps
(``persistent=False``) are caches or constants and stay as they are.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.deltas.target import persistent_buffers
from pipeline.parameters import unwrapped


class Buffers:
    """The persistent buffers of one worker's model, and what they were at the last merge.

    Args:
        model: with equal buffers on every rank.

    Attributes:
        floats, integers: name -> the buffer itself.
    """

    def __init__(self, model: nn.Module) -> None:
        everything = persistent_buffers(model)
        self.floats = {name: b for name, b in everything.items() if b.is_floating_point()}
        self.integers = {name: b for name, b in everything.items() if not b.is_floating_point()}
        self._pairs = [
            (f"{path}.running_mean".lstrip("."), f"{path}.running_var".lstrip("."))
            for path, module in unwrapped(model).named_modules()
            if isinstance(getattr(module, "running_mean", None), Tensor)
            and isinstance(getattr(module, "running_var", None), Tensor)
        ]
        self.mark()

    def mark(self) -> None:
        """Take the buffers as they are for those of the last merge."""
        self._before = {name: _wide(buffer).clone() for name, buffer in self.floats.items()}

    def pack(self, rank: int) -> dict[str, Tensor]:
        """Write down what is to be added up over the ranks.

        Args:
            rank: of this worker; integers come from rank 0.

        Returns:
            ``buffers`` (floats) and ``counters`` (int64), each only where the model has such.
        """
        changes = {name: _wide(buffer) - self._before[name] for name, buffer in self.floats.items()}
        for mean, var in self._pairs:
            if mean in changes and var in changes:
                changes[var] = changes[var] + changes[mean].square()
        packed = {}
        if changes:
            packed["buffers"] = torch.cat([change.reshape(-1) for change in changes.values()])
        if self.integers:
            counts = torch.cat([b.reshape(-1).to(torch.int64) for b in self.integers.values()])
            packed["counters"] = counts if rank == 0 else torch.zeros_like(counts)
        return packed

    @torch.no_grad()
    def unpack(self, sums: Mapping[str, Tensor], size: int) -> None:
        """Write the merged buffers into the model.

        Args:
            sums: of what ``pack`` gave, over the ranks.
            size: W.
        """
        if self.floats:
            parts = (sums["buffers"] / size).split([b.numel() for b in self.floats.values()])
            changes = {n: p.view_as(b) for (n, b), p in zip(self.floats.items(), parts, strict=True)}
            for mean, var in self._pairs:
                if mean in changes and var in changes:
                    spread = self._before[var] + changes[var] - changes[mean].square()
                    changes[var] = spread.clamp_(min=0) - self._before[var]
            for name, buffer in self.floats.items():
                buffer.copy_(self._before[name] + changes[name])
        if self.integers:
            counts = sums["counters"].split([b.numel() for b in self.integers.values()])
            for buffer, count in zip(self.integers.values(), counts, strict=True):
                buffer.copy_(count.view_as(buffer))
        self.mark()


def _wide(buffer: Tensor) -> Tensor:
    """A float buffer in fp32 at least."""
    return buffer.detach() if buffer.dtype == torch.float64 else buffer.detach().float()
