"""fit(): the one training loop, for text and images, on CPU and GPU.

    schedule -> micro-batches forward and backward -> clip -> optimizer step on θ -> write θ into the model

All that a run needs to go on after a kill is in ``Position``, θ, the optimizer's state, the buffers and the
random number generators (``pipeline.training.resume``), and in the mask and the weights once the mask has changed.
What a run tells meanwhile is kept by ``pipeline.training.ledger``. Source: DESIGN, "Masked training"; issues 2, 5.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from pipeline.errors import (
    ArtifactError,
    DataError,
    DivergedError,
    Interrupted,
    MismatchError,
    ModelError,
    ParamsError,
)
from pipeline.losses import Batch, example_losses, to_device
from pipeline.masks.mask import Mask
from pipeline.parameters import tensor_digest
from pipeline.training.batch import count_examples, pieces, to_channels_last
from pipeline.training.device import Device
from pipeline.training.generators import undisturbed
from pipeline.training.ledger import FitResult, Ledger, Progress
from pipeline.training.masked import MaskedParameters
from pipeline.training.memory import Say, halved, out_of_memory
from pipeline.training.recipe import Recipe, make_optimizer
from pipeline.training.resume import ResumeFile
from pipeline.training.schedule import Schedule, make_schedule
from pipeline.training.signals import BreakIn, StopSignals
from pipeline.training.sync import Sync

__all__ = ["FitResult", "Progress", "Recipe", "fit"]

Loss = Callable[[nn.Module, Batch], Tensor]
AfterEpoch = Callable[[Mapping[str, float], nn.Module, Mask], Mask | None]


def fit(
    model: nn.Module,
    batches: Callable[[int], Sequence[Batch]],
    *,
    masked: MaskedParameters,
    recipe: Recipe,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    loss: Loss | None = None,
    device: Device | torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
    resume: ResumeFile | None = None,
    log: Callable[[dict[str, float], int], None] | None = None,
    log_every: int = 50,
    progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    sync: Sync | None = None,
    after_epoch: AfterEpoch | None = None,
    say: Say | None = None,
) -> FitResult:
    """Train θ, and write it into the model.

    An optimizer step takes the gradient of the mean loss over all examples of its ``accumulate`` batches, whatever
    their sizes: with N examples, (1/N) Σ_n ∇ℓ_n. The last step of an epoch takes the batches that are left.
    A batch that does not fit the memory is cut into micro-batches, half as large until they fit, whose gradients
    add up to the same step; BatchNorm, in train mode, takes its statistics over the smaller pieces.
    The model trains in train mode (dropout, BatchNorm on batch statistics) and is left in eval mode. torch's
    generators are seeded with ``recipe.seed``; the order of the data is the callable's business. On the CPU two
    runs with the same thread count are bit-identical.

    Args:
        model: on its device, masked by ``masked``.
        batches: epoch, from 0 -> its batches, in the form of ``pipeline.losses`` (or any form that a ``loss`` of
            your own takes). A sequence of the same length each epoch, the same on every call; an item may be made
            when it is asked for.
        masked: θ and its mask.
        recipe: optimizer, schedule and so on.
        evaluate: model -> metrics, called after each epoch in eval mode, without gradients, under the same
            autocast; it leaves the random number generators as they were.
        loss: (model, batch) -> each example's own loss [B]; cross-entropy or squared error by default.
        device: a check only: where the caller thinks that the model is. A ``Device`` brings its autocast along.
        autocast: dtype of ``torch.autocast``, bfloat16 or None.
        channels_last: give 4-D inputs the channels-last layout, which pays for images on CUDA. The weights keep
            their layout, so that flat coordinates stay what they are.
        resume: where the state of the unfinished run is kept; ``clear`` it once the outputs are written. After a
            finished run it holds the end state, so that running again returns at once.
        log: (values, step): ``loss`` and ``lr`` every ``log_every`` steps, and with them an epoch's entry of the
            history at its end. Steps ascend, but a run that was killed logs what came after its saved state again.
        log_every: optimizer steps.
        progress: called after every optimizer step.
        should_stop: asked after every optimizer step; True saves and raises ``Interrupted``.
        sync: joins this run to others (``pipeline.distributed``); the state is then saved where all are equal.
        after_epoch: (the epoch's entry of the history, model, mask) -> the mask from the next epoch on, or None to
            go on with the same. Called after ``evaluate``; the mask it gets holds all that may have changed in the
            epoch, and the model is in eval mode and as it was before masking, so that it can be scored. It must
            leave the values alone, and do the same when it is called again for an epoch, as it may be after a
            kill. Moments follow the coordinates that stay (``MaskedParameters.remask_``).
        say: takes a sentence where the run had to change its ways: micro-batches.

    Returns:
        History, steps, time, memory.

    Raises:
        ParamsError: if the mask chooses nothing, or autocast is asked for in another dtype than bfloat16.
        ModelError: if the model is on another device than said, the loss is not one number per example, or not
            even one example fits the memory.
        DataError: if there are no batches, an empty one, or another number of them in another epoch.
        DivergedError: if the loss or θ is no longer finite; carries the history.
        Interrupted: on SIGTERM or Ctrl-C (caught where ``resume`` is given), or ``should_stop``: after the step
            under way and a save.
        StorageError: if the state cannot be saved.
    """  # noqa: DOC502 - raised by what it calls
    if isinstance(device, Device):
        autocast = autocast or device.autocast
        device = device.device
    _check(masked, device, autocast)
    ledger = Ledger(masked.values.device, log, log_every, progress)
    run = _Run(model, batches, masked, recipe, evaluate, loss or example_losses, autocast, channels_last, ledger)
    run.resume, run.should_stop, run.sync, run.after_epoch, run.say = resume, should_stop, sync, after_epoch, say
    with StopSignals(enabled=resume is not None) as run.signals:
        return run.all()


@dataclass
class _Run:
    """One life of a run."""

    model: nn.Module
    batches: Callable[[int], Sequence[Batch]]
    masked: MaskedParameters
    recipe: Recipe
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None
    loss: Loss
    autocast: torch.dtype | None
    channels_last: bool
    ledger: Ledger
    resume: ResumeFile | None = None
    should_stop: Callable[[], bool] | None = None
    sync: Sync | None = None
    after_epoch: AfterEpoch | None = None
    say: Say | None = None
    signals: StopSignals = field(default_factory=StopSignals)

    def all(self) -> FitResult:
        """Start or resume, train, finish."""
        recipe, place = self.recipe, self.masked.values.device
        self.place, self.begun, self.remasked = place, self.masked.chosen, False
        torch.manual_seed(recipe.seed)
        self.model.train()
        self.optimizer = make_optimizer(self.masked.values, recipe)
        self.at, self.together = self.ledger.at, True
        if self.sync is not None:
            self.sync.begin(self.optimizer)
        resumed_from, note = self._restore()
        while self.at.epoch < recipe.epochs:
            sequence = self.batches(self.at.epoch)
            self._plan(len(sequence))
            while self.at.batch < self.at.length:
                last = min(self.at.batch + recipe.accumulate, self.at.length)
                self._step([sequence[i] for i in range(self.at.batch, last)])
                self._between_steps()
            self._end_epoch()
        self.model.eval()
        if self.signals.received is not None:  # the process is to end, even though this run is finished
            self._stop()
        return self.ledger.result(resumed_from, note)

    def _restore(self) -> tuple[int | None, str]:
        """Take up the saved state, if there is one; returns the step it stands at, and a note."""
        if self.resume is None:
            return None, ""
        self.resume = self.resume.bound(
            recipe=asdict(self.recipe),
            mask=self.begun.digest,
            kind=type(self.masked).__name__,
            theta=tensor_digest(self.masked.values),
            autocast=self.autocast,
            channels_last=self.channels_last,
            device=self.place.type,
            torch=torch.__version__,
            threads=torch.get_num_threads(),
            cpu=torch.backends.cpu.get_cpu_capability(),
        )
        saved, note = self.resume.load()
        if saved is None:
            return None, note
        try:
            if saved.mask is not None:
                self.masked.remask_(saved.mask)
                self.remasked = True
            saved.restore(self.model, self.masked.values, self.optimizer)
            self.masked.write_()
            if self.sync is not None:
                self.sync.restore(saved.more)
        except (ArtifactError, MismatchError) as error:
            self.masked.remask_(self.begun)
            self.remasked = False
            return None, f"{self.resume.path}: {error}; started anew"
        self.ledger.go_on_from(saved.position)
        self.at = self.ledger.at
        return self.at.step, note

    def _plan(self, length: int) -> None:
        """Fix the number of steps, and with it the schedule, from the length of an epoch."""
        if length == 0:
            raise DataError(
                f"epoch {self.at.epoch + 1} has no batches; check the training data and the batch size"
            )
        if self.at.length not in (0, length):
            raise DataError(
                f"epoch {self.at.epoch + 1} has {length} batches, an earlier one had {self.at.length}; "
                "every epoch must have as many (the schedule counts on it)"
            )
        self.at.length = length
        self.steps = self.recipe.epochs * math.ceil(length / self.recipe.accumulate)
        self.factor: Schedule = make_schedule(self.recipe.schedule, self.steps, self.recipe.warmup)

    def _lr(self, step: int) -> float:
        return self.recipe.lr * self.factor(step)

    def _step(self, group: list[Batch]) -> None:
        """Make one optimizer step on the mean loss over all examples of a group of batches."""
        at, recipe, values = self.at, self.recipe, self.masked.values
        for settings in self.optimizer.param_groups:
            settings["lr"] = self._lr(at.step)
        sizes = [count_examples(batch) for batch in group]
        for total in self._backward(group, sizes):
            self.ledger.enter(total)
        if self.sync is not None:
            self.sync.before_step()
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_([values], recipe.clip)
        self.optimizer.step()
        self.masked.write_()
        self.optimizer.zero_grad(set_to_none=True)
        self.ledger.count(len(group), sum(sizes))
        if self.sync is not None:
            self.together = self.sync.after_step(at.step, last=at.step == self.steps)
            self.remasked = self.remasked or self.masked.chosen is not self.begun

    def _backward(self, group: list[Batch], sizes: list[int]) -> list[Tensor]:
        """Add up the gradient of a step, in micro-batches that fit; returns the summed loss of each."""
        while True:
            try:
                return [
                    self._backward_piece(piece, size, sum(sizes))
                    for batch, whole in zip(group, sizes, strict=True)
                    for piece, size in pieces(batch, whole, self.at.micro)
                ]
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            self.masked.values.grad = None  # outside the handler, whose traceback holds what is to be freed
            for parameter in self.model.parameters():
                parameter.grad = None
            self.at.micro = halved(min(self.at.micro or max(sizes), max(sizes)), "micro-batches", self.say)

    def _backward_piece(self, batch: Batch, size: int, examples: int) -> Tensor:
        batch = to_device(batch, self.place)
        with self._precision():
            losses = self.loss(self.model, to_channels_last(batch) if self.channels_last else batch)
        if losses.shape != (size,):
            raise ModelError(
                f"the loss has shape {list(losses.shape)} for a batch of {size} examples; "
                f"loss=(model, batch) must return each example's own loss, [{size}]"
            )
        total = losses.float().sum() if losses.dtype in (torch.bfloat16, torch.float16) else losses.sum()
        (total / examples).backward()
        return total.detach()

    def _read_losses(self) -> None:
        step = self.ledger.read()
        if step is not None:
            self._diverge("the loss", step)

    def _between_steps(self) -> None:
        """Read, log, show, save, stop: where each is due."""
        if self.ledger.read_is_due:
            self._read_losses()
        self.ledger.tell(self._lr(self.at.step - 1), self.recipe.epochs, self.steps)
        self._stop_if_asked()
        if self.resume is not None and self.together and self.resume.due():
            self._save()

    def _end_epoch(self) -> None:
        """Evaluate, let others look on, enter the epoch into the history, and change the mask."""
        at = self.at
        if not bool(torch.isfinite(self.masked.values).all()):
            self._diverge("a trained value", at.step - 1)
        entry, mask = self.ledger.epoch(), None
        try:
            entry |= self._evaluate()
            if self.after_epoch is not None:
                with self.masked.suspended(), self._aside():
                    mask = self.after_epoch(entry, self.model, self.masked.mask)
        except BreakIn:
            self._stop()
        self.ledger.close_epoch(entry, self._lr(at.step - 1))
        if mask is not None and at.epoch < self.recipe.epochs:
            self.masked.remask_(mask, self.optimizer)
            self.remasked = True
        finished = at.epoch == self.recipe.epochs
        if self.resume is not None and self.together and (finished or self.resume.due()):
            self._save()

    def _evaluate(self) -> dict[str, float]:
        if self.evaluate is None:
            return {}
        # No inference mode: a tensor that a model keeps from it could not take part in training again.
        with self._aside(), torch.no_grad(), self._precision():
            return {name: float(value) for name, value in self.evaluate(self.model).items()}

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Let others use the model so that it leaves no trace in what follows; signals break in."""
        with undisturbed(self.model, self.place), self.signals.at_rest():
            yield

    def _save(self) -> None:
        assert self.resume is not None
        self._read_losses()  # a state that has diverged is never saved
        done = self.at.epoch == self.recipe.epochs
        more = self.sync.state() if self.sync is not None else {}
        optimizer = None if done else self.optimizer
        mask = self.masked.chosen if self.remasked else None
        self.resume.save(self.ledger.now(), self.model, self.masked.values, optimizer, more, mask)

    def _stop_if_asked(self) -> None:
        if self.signals.received is not None or (self.should_stop is not None and self.should_stop()):
            self._stop()

    def _stop(self) -> NoReturn:
        """Save, and leave."""
        if self.resume is not None and self.together:
            self._save()
        epoch, epochs = min(self.at.epoch + 1, self.recipe.epochs), self.recipe.epochs
        then = (
            f"run the same command again to go on from {self.resume.path}" if self.resume else "nothing is saved"
        )
        raise Interrupted(
            f"training stopped in epoch {epoch} of {epochs}, after step {self.at.step}; {then}"
        ) from None

    def _diverge(self, what: str, step: int) -> NoReturn:
        if self.resume is not None:
            self.resume.clear()
        raise DivergedError(
            f"{what} is not finite in epoch {self.at.epoch + 1}, step {step + 1} of {self.steps}, at learning "
            f"rate {self._lr(step):.3g} (peak {self.recipe.lr:.3g}): training diverged; lower lr, clip the "
            "gradient, or warm up longer",
            history=self.at.history,
            step=step,
        )

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.place.type, dtype=self.autocast)


def _check(masked: MaskedParameters, device: torch.device | str | None, autocast: torch.dtype | None) -> None:
    """Refuse what cannot be trained, before anything is touched."""
    place = masked.values.device
    if masked.values.numel() == 0:
        raise ParamsError("the mask chooses no parameter; there is nothing to train")
    if autocast not in (None, torch.bfloat16):
        raise ParamsError(
            f"autocast is {autocast}; expected torch.bfloat16 or None (fp16 would need loss scaling)"
        )
    if device is not None:
        said = torch.device(device)
        if said.type != place.type or said.index not in (None, place.index):
            raise ModelError(f"the model is on {place}, not on {said}; move it before masking it")
