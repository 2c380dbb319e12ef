"""fit(): the one training loop, for text and images, on CPU and GPU.

    schedule -> micro-batches forward and backward -> clip -> optimizer step on θ -> write θ into the model

All that a run needs to go on after a kill is in ``Position``, θ, the optimizer's state, the buffers and the
random number generators (``pipeline.training.resume``). Source: DESIGN, "Masked training"; issue 2.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from pipeline.errors import DataError, DivergedError, Interrupted, MismatchError, ModelError, ParamsError
from pipeline.losses import Batch, example_losses, to_device
from pipeline.parameters import tensor_digest
from pipeline.training.batch import count_examples, to_channels_last
from pipeline.training.device import Device, peak_memory_bytes, reset_peak_memory
from pipeline.training.masked import MaskedParameters
from pipeline.training.recipe import Recipe, make_optimizer
from pipeline.training.resume import Position, ResumeFile, random_state, set_random_state
from pipeline.training.schedule import Schedule, make_schedule
from pipeline.training.signals import BreakIn, StopSignals

__all__ = ["FitResult", "Progress", "Recipe", "fit"]

Loss = Callable[[nn.Module, Batch], Tensor]
_READ_EVERY = 50  # steps between two reads of the loss where a read waits for the device


@dataclass(frozen=True)
class Progress:
    """What a progress display needs; made without waiting for the device.

    Attributes:
        epoch: the epoch under way, from 1.
        epochs: all of them.
        step: optimizer steps done.
        steps: all of them.
        lr: the rate of the last step.
        loss: this epoch's mean loss so far, as last read; None before the first read.
        seconds: time spent in the loop.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    lr: float
    loss: float | None
    seconds: float


@dataclass(frozen=True)
class FitResult:
    """What a finished run leaves besides the trained model.

    Attributes:
        history: one dict per epoch: ``epoch`` (from 1), ``step`` (optimizer steps done), ``train_loss`` (mean over
            the epoch's examples, as met in training) and what ``evaluate`` returned.
        steps: optimizer steps.
        seconds: time in the loop, evaluation included, over all lives of the run.
        peak_memory_bytes: see ``pipeline.training.device.peak_memory_bytes``.
        device: where it ran, such as ``cuda:0``.
        resumed_from: the optimizer step that the last life of the run started from; None for a run in one piece.
        note: why a saved state that was there was not used; "" otherwise.
    """

    history: list[dict[str, float]]
    steps: int
    seconds: float
    peak_memory_bytes: int
    device: str
    resumed_from: int | None = None
    note: str = ""


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
) -> FitResult:
    """Train θ, and write it into the model.

    An optimizer step takes the gradient of the mean loss over all examples of its ``accumulate`` batches, whatever
    their sizes: with N examples, (1/N) Σ_n ∇ℓ_n. The last step of an epoch takes the batches that are left.
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

    Returns:
        History, steps, time, memory.

    Raises:
        ParamsError: if the mask chooses nothing, or autocast is asked for in another dtype than bfloat16.
        ModelError: if the model is on another device than said, or the loss is not one number per example.
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
    run = _Run(model, batches, masked, recipe, evaluate, loss or example_losses, autocast, channels_last)
    run.resume, run.log, run.log_every, run.progress, run.should_stop = (
        resume,
        log,
        log_every,
        progress,
        should_stop,
    )
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
    resume: ResumeFile | None = None
    log: Callable[[dict[str, float], int], None] | None = None
    log_every: int = 50
    progress: Callable[[Progress], None] | None = None
    should_stop: Callable[[], bool] | None = None
    signals: StopSignals = field(default_factory=StopSignals)

    def all(self) -> FitResult:
        """Start or resume, train, finish."""
        recipe, place = self.recipe, self.masked.values.device
        self.place, self.started, self.before = place, time.monotonic(), 0.0
        self.unread: list[tuple[int, Tensor]] = []
        self.mean: float | None = None
        self.read_every = 1 if place.type == "cpu" else _READ_EVERY
        reset_peak_memory(place)
        torch.manual_seed(recipe.seed)
        self.model.train()
        self.optimizer = make_optimizer(self.masked.values, recipe)
        self.at = Position()
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
        return FitResult(
            history=self.at.history,
            steps=self.at.step,
            seconds=self._now().seconds,
            peak_memory_bytes=self._now().peak_memory_bytes,
            device=str(place),
            resumed_from=resumed_from,
            note=note,
        )

    def _restore(self) -> tuple[int | None, str]:
        """Take up the saved state, if there is one; returns the step it stands at, and a note."""
        if self.resume is None:
            return None, ""
        self.resume = self.resume.bound(
            recipe=asdict(self.recipe),
            mask=self.masked.mask.digest,
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
            saved.restore(self.model, self.masked.values, self.optimizer)
        except MismatchError as error:
            return None, f"{self.resume.path}: {error}; started anew"
        self.masked.write_()
        self.at, self.before = saved.position, saved.position.seconds
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
        for batch, size in zip(group, sizes, strict=True):
            batch = to_device(batch, self.place)
            with self._precision():
                losses = self.loss(self.model, to_channels_last(batch) if self.channels_last else batch)
            if losses.shape != (size,):
                raise ModelError(
                    f"the loss has shape {list(losses.shape)} for a batch of {size} examples; "
                    f"loss=(model, batch) must return each example's own loss, [{size}]"
                )
            total = losses.float().sum() if losses.dtype in (torch.bfloat16, torch.float16) else losses.sum()
            (total / sum(sizes)).backward()
            self.unread.append((at.step, total.detach()))
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_([values], recipe.clip)
        self.optimizer.step()
        self.masked.write_()
        self.optimizer.zero_grad(set_to_none=True)
        at.step += 1
        at.batch += len(group)
        at.epoch_examples += sum(sizes)
        at.window_examples += sum(sizes)

    def _read_losses(self) -> None:
        """Fetch the losses of the last steps; waits for the device."""
        if not self.unread:
            return
        totals = torch.stack([total for _, total in self.unread]).tolist()
        for (step, _), total in zip(self.unread, totals, strict=True):
            if not math.isfinite(total):
                self._diverge("the loss", step)
            self.at.epoch_loss += total  # in double and in the order of the steps, whenever it is read
            self.at.window_loss += total
        self.unread.clear()
        self.mean = self.at.epoch_loss / self.at.epoch_examples

    def _between_steps(self) -> None:
        """Read, log, show, save, stop: where each is due."""
        at = self.at
        ends, logs = at.batch == at.length, at.step % self.log_every == 0
        if ends or logs or at.step % self.read_every == 0:
            self._read_losses()
        if logs and not ends:
            self._log({})
        if self.progress is not None:
            lr, seconds = self._lr(at.step - 1), self.before + time.monotonic() - self.started
            epochs = self.recipe.epochs
            self.progress(Progress(at.epoch + 1, epochs, at.step, self.steps, lr, self.mean, seconds))
        self._stop_if_asked()
        if self.resume is not None and self.resume.due():
            self._save()

    def _end_epoch(self) -> None:
        """Evaluate, and enter the epoch into the history."""
        at = self.at
        if not bool(torch.isfinite(self.masked.values).all()):
            self._diverge("a trained value", at.step - 1)
        try:
            metrics = self._evaluate()
        except BreakIn:
            self._stop()
        train_loss = at.epoch_loss / at.epoch_examples
        entry = {"epoch": at.epoch + 1, "step": at.step, "train_loss": train_loss, **metrics}
        at.history.append(entry)
        self._log({key: value for key, value in entry.items() if key != "step"})
        at.epoch, at.batch, at.epoch_loss, at.epoch_examples = at.epoch + 1, 0, 0.0, 0
        self.mean = None
        if self.resume is not None and (at.epoch == self.recipe.epochs or self.resume.due()):
            self._save()

    def _evaluate(self) -> dict[str, float]:
        """Call ``evaluate`` so that it leaves no trace in what follows."""
        if self.evaluate is None:
            return {}
        state = random_state(self.place)
        self.model.eval()
        try:
            # No inference mode: a tensor that a model keeps from it could not take part in training again.
            with self.signals.at_rest(), torch.no_grad(), self._precision():
                return {name: float(value) for name, value in self.evaluate(self.model).items()}
        finally:
            self.model.train()
            set_random_state(state, self.place)

    def _log(self, more: dict[str, float]) -> None:
        at = self.at
        if self.log is not None:
            loss = at.window_loss / at.window_examples
            self.log({"loss": loss, "lr": self._lr(at.step - 1), **more}, at.step)
        at.window_loss, at.window_examples = 0.0, 0

    def _now(self) -> Position:
        """The position, with the time and memory used up to now."""
        seconds = self.before + time.monotonic() - self.started
        memory = max(self.at.peak_memory_bytes, peak_memory_bytes(self.place))
        return replace(self.at, seconds=seconds, peak_memory_bytes=memory)

    def _save(self) -> None:
        assert self.resume is not None
        self._read_losses()  # a state that has diverged is never saved
        done = self.at.epoch == self.recipe.epochs
        self.resume.save(self._now(), self.model, self.masked.values, None if done else self.optimizer)

    def _stop_if_asked(self) -> None:
        if self.signals.received is not None or (self.should_stop is not None and self.should_stop()):
            self._stop()

    def _stop(self) -> NoReturn:
        """Save, and leave."""
        if self.resume is not None:
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
