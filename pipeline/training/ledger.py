"""What a run tells while it trains: losses (read seldom where that waits for the device), rates, time, memory."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.training.device import peak_memory_bytes, reset_peak_memory
from pipeline.training.resume import Position

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


class Ledger:
    """The books of one life of a run.

    Attributes:
        at: the run's position; its sums of losses are kept here.
        read_every: steps between two reads of the loss.
    """

    def __init__(
        self,
        place: torch.device,
        log: Callable[[dict[str, float], int], None] | None,
        log_every: int,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        """Open the books; time and memory count from now.

        Args:
            place: the device.
            log: as in ``fit``.
            log_every: as in ``fit``.
            progress: as in ``fit``.
        """
        self.at = Position()
        self.read_every = 1 if place.type == "cpu" else _READ_EVERY
        self._place, self._log, self._log_every, self._progress = place, log, log_every, progress
        self._unread: list[tuple[int, Tensor]] = []
        self._mean: float | None = None
        self._started, self._before = time.monotonic(), 0.0
        reset_peak_memory(place)

    def go_on_from(self, position: Position) -> None:
        """Take up an earlier life's books."""
        self.at, self._before = position, position.seconds

    def enter(self, total: Tensor) -> None:
        """Note the summed loss of a batch of the step under way; it is not read yet."""
        self._unread.append((self.at.step, total.detach()))

    def count(self, batches: int, examples: int) -> None:
        """Note that a step is done."""
        at = self.at
        at.step += 1
        at.batch += batches
        at.epoch_examples += examples
        at.window_examples += examples

    def read(self) -> int | None:
        """Read the losses of the last steps; waits for the device.

        Returns:
            The first step whose loss is not finite; None if there is none.
        """
        if not self._unread:
            return None
        totals = torch.stack([total for _, total in self._unread]).tolist()
        for (step, _), total in zip(self._unread, totals, strict=True):
            if not math.isfinite(total):
                return step
            self.at.epoch_loss += total  # in double and in the order of the steps, whenever it is read
            self.at.window_loss += total
        self._unread.clear()
        self._mean = self.at.epoch_loss / self.at.epoch_examples
        return None

    @property
    def read_is_due(self) -> bool:
        """Whether the losses are to be read after the step just done."""
        at = self.at
        return at.batch == at.length or at.step % self._log_every == 0 or at.step % self.read_every == 0

    def tell(self, lr: float, epochs: int, steps: int) -> None:
        """Log and show a step, where that is due: the end of an epoch is logged by ``close_epoch``."""
        at = self.at
        if at.step % self._log_every == 0 and at.batch < at.length:
            self._write(lr, {})
        if self._progress is not None:
            seconds = self._before + time.monotonic() - self._started
            self._progress(Progress(at.epoch + 1, epochs, at.step, steps, lr, self._mean, seconds))

    def epoch(self) -> dict[str, float]:
        """Begin the history's entry of the epoch that ends.

        Returns:
            ``epoch``, ``step`` and ``train_loss``.
        """
        at = self.at
        return {"epoch": at.epoch + 1, "step": at.step, "train_loss": at.epoch_loss / at.epoch_examples}

    def close_epoch(self, entry: dict[str, float], lr: float) -> None:
        """Enter an epoch into the history, log it, and turn to the next."""
        at = self.at
        at.history.append(entry)
        self._write(lr, {key: value for key, value in entry.items() if key != "step"})
        at.epoch, at.batch, at.epoch_loss, at.epoch_examples = at.epoch + 1, 0, 0.0, 0
        self._mean = None

    def now(self) -> Position:
        """The position, with the time and memory used up to now."""
        seconds = self._before + time.monotonic() - self._started
        memory = max(self.at.peak_memory_bytes, peak_memory_bytes(self._place))
        return replace(self.at, seconds=seconds, peak_memory_bytes=memory)

    def result(self, resumed_from: int | None, note: str) -> FitResult:
        """Close the books."""
        now = self.now()
        return FitResult(
            history=now.history,
            steps=now.step,
            seconds=now.seconds,
            peak_memory_bytes=now.peak_memory_bytes,
            device=str(self._place),
            resumed_from=resumed_from,
            note=note,
        )

    def _write(self, lr: float, more: dict[str, float]) -> None:
        at = self.at
        if self._log is not None:
            self._log({"loss": at.window_loss / at.window_examples, "lr": lr, **more}, at.step)
        at.window_loss, at.window_examples = 0.0, 0
