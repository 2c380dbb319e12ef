"""The course of one distributed run: dense warm-up, masks, merges, new masks; what ``fit`` asks at every step.

    dense steps -> merge -> masks -> H steps -> merge -> H steps -> merge -> ... -> new masks -> ...

Local SGD on a mask, dense local SGD (a mask of everything) and plain synchronous training (every = 0: the gradient
is averaged at every step, as DistributedDataParallel does) are one code path, so that they can be compared.
Source: "Training Neural Networks with Fixed Sparse Masks", section 4.2, Tables 2 and 3.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from pipeline.distributed.buffers import Buffers
from pipeline.distributed.collectives import Collectives
from pipeline.distributed.local_sgd import LocalSGD
from pipeline.errors import DivergedError, ParamsError
from pipeline.masks.mask import Mask
from pipeline.training.generators import undisturbed
from pipeline.training.masked import MaskedParameters

_REPORTS = 4  # evaluations per epoch at most: one costs as much as many local steps

OnMerge = Callable[[dict[str, float], int], None]
"""(record, step): told on rank 0 after each merge, by the number of steps that a worker has done.

The record holds ``merge`` (its number, from 1), ``bytes`` (handed to collectives by all ranks so far), ``drift``
(root of the mean squared distance of the workers' changes from their mean; absent without local steps), and, at
most four times an epoch and at the last step, what ``evaluate`` gave. A run that is killed tells what came after
its saved state again. ``pipeline.tracking.Run.log`` is one.
"""


@dataclass(frozen=True)
class Course:
    """How the workers of a run work together.

    Attributes:
        every: H, local steps between merges; 0 averages the gradient at every step instead.
        average: ``mean`` or ``sum`` of the workers' changes.
        dense_steps: first steps that train everything, before the masks are chosen.
        renew: merges between two choices of masks; 0 keeps the first.
        own_masks: every worker has a mask of its own.
        outer: learning rate and momentum of an outer Nesterov SGD, as in DiLoCo; None adds the merged change.
        dtype: in which changes travel, fp32 or bf16.
        steps_per_epoch: optimizer steps of one rank.
        steps: of the whole run.
        debug: check after each merge that all ranks are bitwise equal.
    """

    every: int
    steps_per_epoch: int
    steps: int
    average: str = "mean"
    dense_steps: int = 0
    renew: int = 0
    own_masks: bool = False
    outer: tuple[float, float] | None = None
    dtype: torch.dtype = torch.float32
    debug: bool = False

    def __post_init__(self) -> None:
        if self.every == 0 and (self.own_masks or self.outer or self.dtype != torch.float32):
            raise ParamsError(
                "every is 0 (the gradient is averaged at every step): own_masks, outer and bf16 belong to local "
                "steps; set every to 1 or more, or leave them out"
            )


class Rounds:
    """One rank's side of a distributed run: a ``pipeline.training.sync.Sync``.

    Args:
        masked: θ; under a mask of everything where there are dense steps, else under this rank's first mask.
        course: how the workers work together.
        head: module names of the head, averaged even under ``sum``.
        choose: (model, number of the choice, from 0) -> this rank's mask; asked for after the dense steps, and for
            every renewal, on merged models.
        evaluate: model -> metrics, in eval mode; asked on rank 0 at some of the merges.
        log: told of each merge, on rank 0.

    Attributes:
        records: one dict per merge: ``merge``, ``step``, ``bytes`` (handed to collectives by all ranks so far),
            ``drift``, and at evaluations their metrics.
        touched: the coordinates that any mask of the run had, of any worker: what a delta must hold.
        wire: the collectives of this run beside the merges.
    """

    def __init__(
        self,
        masked: MaskedParameters,
        course: Course,
        *,
        head: tuple[str, ...] = (),
        choose: Callable[[nn.Module, int], Mask] | None = None,
        evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
        log: OnMerge | None = None,
    ) -> None:
        if choose is None and (course.dense_steps or course.renew):
            raise ParamsError("dense steps and renewed masks need a way to choose masks")
        self._masked, self._course, self._head = masked, course, list(head)
        self._choose, self._evaluate, self._log = choose, evaluate, log
        self.wire = Collectives()
        self.records: list[dict[str, float]] = []
        self._step, self._merges, self._reported = 0, 0, 0
        self._choices, self._since = int(not course.dense_steps), 0
        self._all_know = False  # that training has diverged

    @property
    def bytes(self) -> dict[str, int]:
        """What all ranks together have handed to collectives for others, by purpose."""
        own = self.wire.bytes + (self.sync.bytes if self.sync is not None else type(self.wire.bytes)())
        return {purpose: count * self.wire.size for purpose, count in sorted(own.items())}

    @property
    def nnz(self) -> int:
        """Coordinates that this rank trains now."""
        return self._masked.mask.nnz

    def begin(self, optimizer: Optimizer) -> None:
        """Start, on every rank: the models and masks are compared."""
        course, self._optimizer = self._course, optimizer
        self.sync: LocalSGD | None = None
        self._buffers = Buffers(self._masked.model)
        if course.every:
            outer = (
                None if course.outer is None else partial(_nesterov, lr=course.outer[0], momentum=course.outer[1])
            )
            self.sync = LocalSGD(
                self._masked, optimizer, every=course.every, average=course.average, outer=outer,
                dtype=course.dtype, own_masks=course.own_masks and not course.dense_steps, head=self._head,
                debug=course.debug,
            )  # fmt: skip
        self.touched = self._masked.mask if self.sync is None else self.sync.union

    def before_step(self) -> None:
        """Average the gradient over the ranks, where every step is synchronous."""
        if self.sync is not None or self.wire.size == 1:
            return
        values = self._masked.values
        grad = torch.zeros_like(values) if values.grad is None else values.grad
        self.wire.all_reduce_("values", grad)
        values.grad = grad.div_(self.wire.size)
        if not bool(torch.isfinite(grad).all()):
            self._parted("the gradient")

    def after_step(self, step: int, last: bool) -> bool:
        """Merge, choose masks, evaluate: where each is due.

        Returns:
            Whether all ranks hold the same.

        Raises:
            DivergedError: if a merged value is not finite, on all ranks.
        """
        course, self._step = self._course, step
        turn = last or step == course.dense_steps
        report = turn or step - self._reported >= -(-course.steps_per_epoch // _REPORTS)
        if self.sync is None:
            if not report:
                return False
            if self.wire.size > 1:
                sums = self._buffers.pack(self.wire.rank)
                self.wire.sum_(sums)
                self._buffers.unpack(sums, self.wire.size)
        else:
            try:
                merged = self.sync.step() or (turn and self.sync.finish())
            except DivergedError:
                self._all_know = True
                raise
            if not (merged or turn):
                return False
        self._merges += 1
        self._since += 1
        record: dict[str, float] = {"merge": self._merges, "step": step, "bytes": sum(self.bytes.values())}
        record |= {"drift": self.sync.drift} if self.sync is not None else {}
        if self._evaluate is not None and report and self.wire.rank == 0:
            record |= self._evaluated(self._evaluate)
        if report:
            self._reported = step
        self.records.append(record)
        if self._log is not None and self.wire.rank == 0:
            self._log({key: value for key, value in record.items() if key != "step"}, step)
        due = step == course.dense_steps or (course.renew and self._choices and self._since == course.renew)
        if due and not last:
            self._renew()
        return True

    def give_up(self) -> None:
        """Tell the other ranks that this one's training diverged, so that all stop at the next exchange.

        Raises:
            DivergedError: always, on all ranks.
        """
        while self.wire.size > 1 and not self._all_know:
            self._masked.values.data.fill_(float("nan"))
            self._masked.values.grad = torch.full_like(self._masked.values, float("nan"))
            self.before_step()
            self.after_step(self._step + 1, last=self._step + 1 >= self._course.steps)
        raise DivergedError("training diverged on another worker", step=self._step)

    def state(self) -> dict[str, Tensor]:
        """What a resume needs beside θ, the optimizer and the buffers.

        Returns:
            Tensors by name.
        """
        numbers = {
            "records": self.records, "merges": self._merges, "reported": self._reported, "since": self._since,
            "choices": self._choices, "step": self._step, "bytes": dict(self.wire.bytes),
            "touched": self.touched.info,
        }  # fmt: skip
        text = json.dumps(numbers).encode()
        state = {"numbers": torch.frombuffer(bytearray(text), dtype=torch.uint8)}
        state |= {f"touched.{n}": t for n, t in self.touched.pack(compact=False).items()}
        return state | ({f"sync.{n}": t for n, t in self.sync.state().items()} if self.sync is not None else {})

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what ``state`` gave, on every rank."""
        numbers: dict[str, Any] = json.loads(bytes(state["numbers"].tolist()))
        self.records, self._merges, self._reported = numbers["records"], numbers["merges"], numbers["reported"]
        self._since, self._choices, self._step = numbers["since"], numbers["choices"], numbers["step"]
        if self.sync is not None:
            self._remask(self._masked.mask)  # so that all workers' coordinates are known
            self.sync.restore(_part(state, "sync"))
        self.touched = Mask.unpack(_part(state, "touched"), "the saved state", numbers["touched"])
        self.wire.bytes.clear()
        self.wire.bytes.update(numbers["bytes"])
        self._buffers.mark()

    def _renew(self) -> None:
        """Choose masks on the merged model; on all ranks, at the same merge."""
        assert self._choose is not None
        model, place = self._masked.model, self._masked.values.device
        with self._masked.suspended(), undisturbed(model, place):
            mask = self._choose(model, self._choices)
        self._choices, self._since = self._choices + 1, 0
        self._remask(mask)
        self.touched = self.touched | (self._masked.mask if self.sync is None else self.sync.union)

    def _remask(self, mask: Mask) -> None:
        if self.sync is None:
            self.wire.agree("the mask", mask.digest)
            self._masked.remask_(mask, self._optimizer)
        else:
            self.sync.remask_(mask, own_masks=self._course.own_masks and bool(self._choices))

    def _evaluated(self, evaluate: Callable[[nn.Module], Mapping[str, float]]) -> dict[str, float]:
        model = self._masked.model
        with undisturbed(model, self._masked.values.device), torch.no_grad():
            return {name: float(value) for name, value in evaluate(model).items()}

    def _parted(self, what: str) -> None:
        self._all_know = True
        raise DivergedError(
            f"{what} averaged over {self.wire.size} workers is not finite at step {self._step + 1}: training "
            "diverged; lower lr, clip the gradient, or warm up longer",
            step=self._step,
        )


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(f"{prefix}."): t for n, t in state.items() if n.startswith(f"{prefix}.")}


def _nesterov(parameters: list[nn.Parameter], lr: float, momentum: float) -> Optimizer:
    return SGD(parameters, lr=lr, momentum=momentum, nesterov=momentum > 0)
