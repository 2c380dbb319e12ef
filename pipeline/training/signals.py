"""SIGTERM and Ctrl-C, heard between two steps instead of in the middle of one."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self


class BreakIn(BaseException):
    """A signal arrived while the run was at rest. No ``Exception``, so that no code in between swallows it."""


class StopSignals:
    """SIGTERM and Ctrl-C as a wish that the loop asks about between two steps.

    A step is thus never cut in half. A second Ctrl-C interrupts at once. Inside ``at_rest``, where the state is
    whole and only read, a signal breaks in at once. Handlers stand in the main thread only; the former ones are
    put back on exit.

    Attributes:
        received: the number of the signal that arrived; None before.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.received: int | None = None
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._resting = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT) if self._enabled else ():
            self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[None]:
        """Let signals break in.

        Yields:
            None, while they do.

        Raises:
            BreakIn: at the signal, or at once if one arrived before.
        """
        self._resting = True
        try:
            if self.received is not None:
                raise BreakIn
            yield
        finally:
            self._resting = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if self._resting:
            raise BreakIn
