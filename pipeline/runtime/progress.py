"""Progress on stderr: a live bar in a terminal, plain lines elsewhere, silence on request."""

import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_PLAIN_EVERY_SECONDS = 10.0


class ProgressLine:
    """One line of work with a known number of steps.

    Args:
        what: the name shown, such as ``train words-fish-main``.
        stream: where to; stderr by default, so that stdout stays for results.
    """

    def __init__(self, what: str, stream: TextIO | None = None) -> None:
        self._what = what
        self._stream = stream or sys.stderr
        self._live: Progress | None = None
        self._row = TaskID(0)
        self._last = 0.0
        self._begun: tuple[int, float] | None = None

    def __enter__(self) -> "ProgressLine":
        if self._stream.isatty():
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(file=self._stream),
                transient=True,
            )
            self._live.start()
            self._row = self._live.add_task(self._what, total=None, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, done: int, total: int, note: str = "") -> None:
        """Show that ``done`` of ``total`` steps are done.

        In no terminal a line is printed every ten seconds and at the end, with the time that the rest will take at
        the pace so far.
        """
        if self._live is not None:
            self._live.update(self._row, completed=done, total=total, note=note)
            return
        now = time.monotonic()
        self._begun = self._begun or (done, now)
        if done == total or now - self._last > _PLAIN_EVERY_SECONDS:
            self._last = now
            first, begun = self._begun
            if first < done < total:
                left = round((now - begun) / (done - first) * (total - done))
                note = f"{note}, about {left // 60}:{left % 60:02d} left".removeprefix(", ")
            print(f"{self._what}: {done}/{total} {note}".rstrip(), file=self._stream, flush=True)

    def say(self, sentence: str) -> None:
        """Show a sentence for good, above the line of work."""
        if self._live is not None:
            self._live.console.print(sentence, markup=False, highlight=False)
        else:
            print(sentence, file=self._stream, flush=True)
