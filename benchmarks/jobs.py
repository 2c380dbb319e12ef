"""Work in many parts, done by worker processes: a part has a rank, a cost, and parts that must have ended before.

One process knows what there is to do and hands it out; nothing but results comes back, so that what is shared is
written by one process. A part that fails takes with it those that wait for it, and no others.
"""

import contextlib
import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from pipeline.errors import FishmaskError, Interrupted
from pipeline.runtime.process import end_with_parent

GRACE = 10.0
"""Seconds that a worker has to save what it does, before it is killed."""


@dataclass(frozen=True)
class Job:
    """One part.

    Attributes:
        name: of its own.
        call: asked in this process when the part is handed out -> a module's function and its arguments.
        rank: the lowest goes first.
        cost: among equal ranks the longest goes first.
        after: names that must have ended.
        then: called in this process with the result.
        goal: a name that fails with it, where the part is one of several on the way to it.
    """

    name: str
    call: Callable[[], tuple[Any, ...]]
    rank: tuple[int, ...] = ()
    cost: float = 0.0
    after: frozenset[str] = frozenset()
    then: Callable[[Any], None] | None = None
    goal: str = ""


class Board:
    """What is to be done.

    Attributes:
        waiting: name -> a part that was not handed out yet.
        done: names that have ended.
        failed: name -> why.
    """

    def __init__(self) -> None:
        self.waiting: dict[str, Job] = {}
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}

    def add(self, job: Job) -> None:
        """Put a part up, unless it is up or has ended already, or what it waits for has failed."""
        if job.name in self.waiting or job.name in self.done:
            return
        if lost := sorted(job.after & self.failed.keys()):
            self.fail(job.name, f"needs {lost[0]}")
        else:
            self.waiting[job.name] = job

    def finish(self, name: str) -> None:
        """Note that a name has ended; it may be one without a part of its own."""
        self.done.add(name)

    def fail(self, name: str, why: str) -> None:
        """Note that a name will not end, and with it all that wait for it."""
        self.failed[name] = why
        for job in [*self.waiting.values()]:
            if name in job.after and self.waiting.pop(job.name, None):
                self.fail(job.name, f"needs {name}")

    def take(self) -> Job | None:
        """Take the part that is to be done next; None where nothing can be done now."""
        ready = [job for job in self.waiting.values() if job.after <= self.done]
        if not ready:
            return None
        return self.waiting.pop(min(ready, key=lambda job: (job.rank, -job.cost)).name)


def work(
    board: Board, workers: int, prepare: tuple[Any, ...], logs: Path, until: float | None = None,
    tell: Callable[[str, float, str], None] = lambda name, seconds, why: None,
) -> bool:  # fmt: skip
    """Do all that is on a board, in processes of their own.

    Args:
        board: it may grow while it is worked on.
        workers: how many processes.
        prepare: a module's function and its arguments, called in each before anything else.
        logs: the folder for what the processes print.
        until: the ``time.monotonic`` at which no more is handed out, and what runs is ended.
        tell: told of each part that ends: its name, seconds, and why it failed or "".

    Returns:
        Whether the board is empty; False where time ran out.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with _crew(workers, prepare, logs) as crew:
        while True:
            for worker in crew:
                if worker.job is None and (job := board.take()) is not None:
                    worker.hand(job)
            busy = {worker.pipe: worker for worker in crew if worker.job is not None}
            left = None if until is None else until - time.monotonic()
            if not busy or (left is not None and left <= 0):
                return not busy and not board.waiting
            for pipe in wait(list(busy), left):
                worker = busy[pipe]  # type: ignore[index]
                job, (right, result, seconds) = worker.answer()
                tell(job.name, seconds, "" if right else result)
                if right:
                    board.finish(job.name)
                    if job.then is not None:
                        job.then(result)
                else:
                    for name in filter(None, (job.name, job.goal)):
                        board.fail(name, result)
                if not worker.process.is_alive():
                    crew[crew.index(worker)] = _Worker(worker.number, prepare, logs)


class _Worker:
    """A process that does one part after the other, and the part that it does."""

    def __init__(self, number: int, prepare: tuple[Any, ...], logs: Path) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share the parent's threads' locks
        self.number, self.log = number, logs / f"{number}.log"
        self.job: Job | None = None
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, prepare, self.log), daemon=True)
        self.process.start()
        theirs.close()

    def hand(self, job: Job) -> None:
        """Give it a part; a process that has died shows when it is asked."""
        self.job = job
        with contextlib.suppress(OSError):
            self.pipe.send(job.call())

    def answer(self) -> tuple[Job, tuple[bool, Any, float]]:
        """What became of its part: whether it went well, the result or the reason, and the seconds."""
        job, self.job = self.job, None
        assert job is not None
        try:
            return job, self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(GRACE)
            why = f"its process ended with exit code {self.process.exitcode}; see {self.log}"
            return job, (False, why, 0.0)


@contextlib.contextmanager
def _crew(count: int, prepare: tuple[Any, ...], logs: Path) -> Iterator[list[_Worker]]:
    """Processes while they are needed; at the end those at work are told to stop, and killed if they do not."""
    crew = [_Worker(number, prepare, logs) for number in range(count)]
    try:
        yield crew
    finally:
        for worker in crew:
            worker.pipe.close()
            if worker.job is not None:
                worker.process.terminate()
        end = time.monotonic() + GRACE
        for worker in crew:
            worker.process.join(max(0.0, end - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()


def _serve(pipe: Connection, prepare: tuple[Any, ...], log: Path) -> None:
    """What a worker process does."""
    end_with_parent(grandparent=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent tells
    with (
        log.open("a", buffering=1) as stream,
        contextlib.redirect_stderr(stream),
        contextlib.redirect_stdout(stream),
    ):
        function, *arguments = prepare
        function(*arguments)
        while True:
            try:
                function, *arguments = pipe.recv()
            except EOFError:
                return
            started = time.monotonic()
            try:
                answer: tuple[bool, Any] = True, function(*arguments)
            except Interrupted:
                sys.exit(Interrupted.code)
            except FishmaskError as error:
                answer = False, str(error)
            except Exception as error:  # a part of its own: whatever it is, the others go on
                traceback.print_exc()
                answer = False, f"{type(error).__name__}: {error}"
            pipe.send((*answer, time.monotonic() - started))
