"""The coordinates of all workers together, and where one worker's stand among them.

Where the workers share one mask the joint space is θ itself; where each has its own it is their union.

Shape legend: k trained values of this worker; K of all workers together (K = k where they share one mask).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.distributed.collectives import Collectives
from pipeline.masks.mask import Mask
from pipeline.parameters import put_, take
from pipeline.training.masked import MaskedParameters, fitting_parameters, staying


class JointSpace:
    """What all workers train, under their masks of now; made on every rank at the same time.

    Args:
        masked: θ and the mask of this worker.
        wire: joins the ranks; it carries their masks, where they differ, or their digests.
        own_masks: whether the workers' masks may differ.
        average: ``mean`` over the workers that train a coordinate, or ``sum``.
        head: module names that are averaged even under ``sum``.

    Attributes:
        union: the coordinates of all workers.
        divisor: of a sum of changes, [K]: the number of workers that train the coordinate, or 1.

    Raises:
        MismatchError: if the masks differ but may not.
    """  # noqa: DOC502 - raised by what it calls

    def __init__(
        self,
        masked: MaskedParameters,
        wire: Collectives,
        *,
        own_masks: bool,
        average: str,
        head: Sequence[str],
    ) -> None:
        self._masked = masked
        mine, place = masked.mask, masked.values.device
        self.union = mine
        self._change: Tensor | None = None
        self._places: Tensor | None = None  # of θ in the joint space; None where it is all of it
        counts = torch.full((mine.nnz,), float(wire.size))
        if own_masks and wire.size > 1:
            sections = {n: wire.gather_bytes("masks", s) for n, s in mine.pack(compact=False).items()}
            masks = [Mask.unpack({n: s[r] for n, s in sections.items()}, f"rank {r}") for r in range(wire.size)]
            for mask in masks:
                self.union = self.union | mask
            self._places = staying(self.union, mine)[1].to(place)
            counts = torch.zeros(self.union.nnz)
            for mask in masks:
                counts[staying(self.union, mask)[1]] += 1
        elif wire.size > 1:
            wire.agree("the mask", mine.digest)
        self._targets: list[tuple[nn.Parameter, Tensor | None, slice]] = []
        start, averaged = 0, set(self.union.index.within(list(head)))
        for name, parameter in fitting_parameters(masked.model, self.union).items():
            stretch = slice(start, start + self.union.count(name))
            coordinates = None if self.union.whole(name) else self.union.indices[name].to(place)
            if stretch.stop > start:
                self._targets.append((parameter, coordinates, stretch))
            if average == "sum" and name not in averaged:
                counts[stretch] = 1
            start = stretch.stop
        self.divisor = counts.to(place, masked.values.dtype)

    def read(self) -> Tensor:
        """Copy the values from the model, masters where this worker has them.

        Returns:
            [K].
        """
        theta = self._masked.values.detach()
        if self._places is None:
            return theta.clone()
        values = torch.cat([take(parameter, at) for parameter, at, _ in self._targets]).to(theta.dtype)
        values[self._places] = theta
        return values

    def change(self, since: Tensor) -> Tensor:
        """Tell how far this worker's θ has gone.

        Args:
            since: the values of all workers' coordinates before, [K].

        Returns:
            [K], overwritten by the next call; 0 at coordinates that this worker does not train.
        """
        theta = self._masked.values.detach()
        if self._change is None:  # kept: a dense one costs more to allocate than to fill
            self._change = torch.empty_like(since)
        if self._places is None:
            return torch.sub(theta, since, out=self._change)
        self._change.zero_()[self._places] = theta - since[self._places]
        return self._change

    @torch.no_grad()
    def write_(self, values: Tensor) -> None:
        """Make values everybody's: into θ, and into the model.

        Args:
            values: [K].
        """
        if self._places is None:
            self._masked.values.copy_(values)
            self._masked.write_()
            return
        self._masked.values.copy_(values[self._places])
        for parameter, at, stretch in self._targets:
            put_(parameter, at, values[stretch].to(parameter.dtype))
