"""LocalSGD: H local steps, then one reduction in mask coordinates.

    model = build(seed=0)                                            # the same on every rank
    masked = MaskedParameters(model, mask)
    opt = torch.optim.AdamW([masked.values], lr=1e-3)
    sync = LocalSGD(masked, opt, every=30, average="mean")
    for batch in my_shard:                                           # as many batches on every rank
        loss(model, batch).backward(); opt.step(); masked.write_(); opt.zero_grad()
        sync.step()                                                  # True when a reduction happened
    sync.finish()                                                    # what is left of the last round

Run it under ``torchrun`` after ``torch.distributed.init_process_group``, or alone: without a process group it is
plain training, bit for bit.

Sources: Sung, Nair, Raffel, "Training Neural Networks with Fixed Sparse Masks", section 4.2; Stich, "Local SGD
Converges Fast and Communicates Little" (arXiv 1805.09767); outer optimizer: DiLoCo (arXiv 2311.08105).

Shape legend: k trained values of this worker; K of all workers together (K = k where they share one mask).
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.distributed.buffers import Buffers
from pipeline.distributed.collectives import Collectives
from pipeline.distributed.joint_space import JointSpace
from pipeline.errors import DivergedError, ParamsError
from pipeline.masks.mask import Mask
from pipeline.parameters import base_digest, digest_of_digests, tensor_digest
from pipeline.training.masked import MaskedParameters, staying

AVERAGES = ("mean", "sum")
_DTYPES = (torch.float32, torch.bfloat16)
_PIECE = 1 << 18  # elements
Outer = Callable[[list[nn.Parameter]], Optimizer]


class LocalSGD:
    """Keeps the workers of a run together: at a merge their changes are added up, in one exchange.

    At a merge each worker has changed θ by d_r since the last one, where all held a. With the mean over the
    workers that train a coordinate (all of them, or those whose own masks have it), and one exchange for
    everything::

        a <- a + Σ_r d_r / c        c = the number of workers that train the coordinate, or 1 for "sum"
        a <- outer.step(gradient = -Σ_r d_r / c)                               with an outer optimizer

    and θ <- a. Coordinates in no worker's mask are never touched or sent. The head is part of θ like any other
    tensor. Buffers are merged as ``pipeline.distributed.buffers`` says. The inner optimizer's moments stay each
    worker's own; they are neither sent nor reset.

    Args:
        masked: θ and the model; the model must be the same on all ranks (checked).
        optimizer: the inner one, which holds ``masked.values``.
        every: H, local steps between two merges, at least 1.
        average: ``mean`` or ``sum`` of the workers' changes.
        outer: parameters -> an optimizer for the merged change, such as
            ``lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9, nesterov=True)``; None adds the change.
        dtype: in which changes travel: fp32, or bf16 with error feedback (half the bytes).
        own_masks: every worker has a mask of its own, and all end with the values of all (the union). Otherwise
            the masks must be equal.
        head: module names whose change is averaged even under ``sum``: every worker trains them, and their sum
            would be W times too far.
        debug: compare digests of θ and buffers over all ranks after each merge (32 bytes and a hash).
        group: the process group; None for the default one.

    Attributes:
        merges: reductions done.
        drift: root of the mean squared distance of the workers' changes from their mean, at the last merge.
        rank, size: of this worker, and the number of workers.
        bytes: handed to collectives by this rank, by purpose: ``values``, ``buffers``, ``counters``, ``masks``,
            ``digests``, ``control``, ``padding``.

    Raises:
        ParamsError: if an argument is out of range.
        MismatchError: if models or (without ``own_masks``) masks differ between ranks.
        WorkerError: if another worker died, hung or cannot be reached.
    """  # noqa: DOC502 - raised by what it calls

    def __init__(
        self,
        masked: MaskedParameters,
        optimizer: Optimizer,
        *,
        every: int,
        average: str = "mean",
        outer: Outer | None = None,
        dtype: torch.dtype = torch.float32,
        own_masks: bool = False,
        head: Sequence[str] = (),
        debug: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if every < 1:
            raise ParamsError(f"every is {every}; expected 1 or more local steps between two merges")
        if average not in AVERAGES:
            raise ParamsError(f"average is '{average}'; expected one of {', '.join(AVERAGES)}")
        if dtype not in _DTYPES:
            raise ParamsError(f"dtype is {dtype}; expected torch.float32 or torch.bfloat16")
        self._masked, self._optimizer = masked, optimizer
        self._every, self._average, self._head = every, average, list(head)
        self._own, self._debug = own_masks, debug
        self._wire = Collectives(group)
        self.rank, self.size, self.bytes = self._wire.rank, self._wire.size, self._wire.bytes
        self.merges, self.drift, self._since = 0, 0.0, 0
        self._buffers = Buffers(masked.model)
        if self.size > 1:
            self._wire.agree("the model", base_digest(masked.model))
            self._wire.agree("the model's buffers", self._digest(buffers_only=True))
        self._space = self._joint_space()
        self._anchor = nn.Parameter(self._space.read())  # a: what all workers held at the last merge, [K]
        self._residuals = {"values": torch.zeros_like(self._anchor.data)} if dtype == torch.bfloat16 else {}
        self._outer = outer([self._anchor]) if outer is not None else None

    @property
    def bytes_sent(self) -> int:
        """What this rank has handed to collectives for other ranks, in bytes, over all purposes."""
        return self._wire.bytes_sent

    @property
    def union(self) -> Mask:
        """The coordinates of all workers together: the mask itself where they share it."""
        return self._space.union

    def step(self) -> bool:
        """Count one local step; merge when it is the H-th since the last merge.

        Call it after every ``opt.step(); masked.write_()``, on every rank.

        Returns:
            True when a merge happened: θ, model and buffers are now equal on all ranks.

        Raises:
            DivergedError: if the merged values are not finite (on all ranks).
            WorkerError: if another worker died, hung or cannot be reached.
        """  # noqa: DOC502 - raised by what it calls
        self._since += 1
        if self._since < self._every:
            return False
        self._merge()
        return True

    def finish(self) -> bool:
        """Merge what is left of a round that is not full; every rank calls it, in the same place.

        Returns:
            True if any rank had local steps to merge.

        Raises:
            DivergedError: if the merged values are not finite (on all ranks).
            WorkerError: if another worker died, hung or cannot be reached.
        """  # noqa: DOC502 - raised by what it calls
        if not self._wire.largest("control", self._since):
            return False
        self._merge()
        return True

    def remask_(self, mask: Mask, *, own_masks: bool | None = None) -> None:
        """Train other coordinates from now on; right after a merge, on every rank.

        Coordinates that stay keep their moments, inner and outer; new ones start with none. Rounding errors not
        yet sent (bf16) are dropped.

        Args:
            mask: this worker's new one.
            own_masks: whether the workers' masks may differ from now on; None leaves it as it was.

        Raises:
            ParamsError: if local steps have not been merged yet.
            MismatchError: if the mask is of another model, or the workers' masks differ but may not.
        """  # noqa: DOC502 - raised by what it calls
        if self._since:
            raise ParamsError(f"remask_ after {self._since} local steps; call finish() first, on every rank")
        self._own = self._own if own_masks is None else own_masks
        old, anchor = self.union, self._anchor.detach()
        self._masked.remask_(mask, self._optimizer)
        self._space = self._joint_space()
        place = anchor.device
        kept, source = (t.to(place) for t in staying(old, self.union))
        fresh = self._space.read()
        fresh[kept] = anchor[source]  # masters: the model's own may be bf16
        state = {} if self._outer is None else self._outer.state[self._anchor]
        for key, moment in state.items():
            if isinstance(moment, Tensor) and moment.shape == anchor.shape:
                moved = moment.new_zeros(fresh.shape)
                moved[kept] = moment[source]
                state[key] = moved
        self._anchor.data = fresh
        for name in self._residuals:
            self._residuals[name] = torch.zeros_like(fresh)
        self._space.write_(self._anchor.detach())

    def state(self) -> dict[str, Tensor]:
        """What a resume needs beside θ, the inner optimizer and the buffers; only right after a merge.

        Returns:
            Tensors by name, of this rank.
        """
        state = {"anchor": self._anchor.detach(), "merges": torch.tensor(self.merges)}
        state |= {f"residual.{name}": residual for name, residual in self._residuals.items()}
        state |= {f"bytes.{purpose}": torch.tensor(count) for purpose, count in self.bytes.items()}
        moments = self._outer.state[self._anchor] if self._outer is not None else {}
        return state | {f"outer.{key}": value for key, value in moments.items() if isinstance(value, Tensor)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what ``state`` gave; the mask is the one it was taken under."""
        self._anchor.data.copy_(state["anchor"])
        self.merges, self._since = int(state["merges"]), 0
        self.bytes.clear()
        for name, value in state.items():
            kind, _, key = name.partition(".")
            if kind == "residual":
                self._residuals[key].copy_(value)
            elif kind == "bytes":
                self.bytes[key] = int(value)
            elif kind == "outer" and self._outer is not None:
                self._outer.state[self._anchor][key] = value.to(self._anchor.device).clone()
        self._space.write_(self._anchor.detach())
        self._buffers.mark()

    @torch.no_grad()
    def _merge(self) -> None:
        """Add up the changes of all workers and make the result everybody's."""
        self._since, self.merges = 0, self.merges + 1
        if self.size == 1 and self._outer is None:
            return  # plain training: a + (θ - a) would round
        anchor = self._anchor.detach()
        change_K = self._space.change(anchor)
        sums = {"values": change_K, "control": _squared(change_K), **self._buffers.pack(self.rank)}
        self._wire.sum_(sums, self._residuals)
        squared = float(sums["control"]) / self.size - float(_squared(change_K)) / self.size**2
        self.drift = max(squared, 0.0) ** 0.5
        merged_K = change_K.div_(self._space.divisor)
        if self._outer is None:
            anchor += merged_K
        else:
            self._anchor.grad = merged_K.neg_()
            self._outer.step()
            self._anchor.grad = None
        if not _finite(anchor):
            raise DivergedError(
                f"merge {self.merges} of {self.size} workers gave a value that is not finite: training diverged; "
                "lower lr, or merge more often"
            )
        if self.size > 1:
            self._buffers.unpack(sums, self.size)
        self._space.write_(self._anchor.detach())
        if self._debug:
            self._wire.agree(f"the result of merge {self.merges}", self._digest())

    def _joint_space(self) -> JointSpace:
        """Find the coordinates of all workers under the masks of now."""
        return JointSpace(self._masked, self._wire, own_masks=self._own, average=self._average, head=self._head)

    def _digest(self, buffers_only: bool = False) -> str:
        """Digest what must be equal on all ranks after a merge."""
        tensors = {**self._buffers.floats, **self._buffers.integers}
        if not buffers_only:
            tensors |= {"values of all workers": self._anchor, **dict(self._masked.model.named_parameters())}
        return digest_of_digests({name: tensor_digest(tensor) for name, tensor in tensors.items()})


def _squared(vector: Tensor) -> Tensor:
    """Sum the squares in float64, a piece at a time: a dense θ in float64 would take twice its memory. [1]."""
    return torch.stack([piece.double().square().sum() for piece in vector.split(_PIECE)]).sum().reshape(1)


def _finite(vector: Tensor) -> bool:
    """Tell whether all values are finite; their sum alone may overflow."""
    return bool(torch.isfinite(vector.sum())) or bool(torch.isfinite(vector).all())
