"""A stage as a well-behaved process: alone on its cell, gone with its parent, stopped cleanly."""

import contextlib
import ctypes
import fcntl
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from pipeline.errors import BusyError, Interrupted, StorageError
from pipeline.runtime.atomic import reason

_PR_SET_PDEATHSIG = 1
_PARENT_CHECK_SECONDS = 0.5


@contextlib.contextmanager
def alone(lock: Path, what: str) -> Iterator[None]:
    """Hold an exclusive lock file; a second process is refused at once (killing DVC can leave a stage alive).

    The kernel drops the lock with the process, so a killed stage leaves no stale lock.

    Args:
        lock: the lock file; its folder is created.
        what: the name of the cell, for the message.

    Yields:
        None, while the lock is held.

    Raises:
        BusyError: if another live process holds it; names that process.
        StorageError: if the lock file cannot be made or written.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(f"{lock}: cannot create the lock file: {error.strerror}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 32, 0).decode(errors="replace").strip() or "unknown"
            raise BusyError(
                f"{what}: process {owner} is working on it; wait for it, or end it and run again"
            ) from None
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
        except OSError as error:
            raise StorageError(f"{lock}: {reason(error)}") from None
        yield
    finally:
        os.close(handle)


def end_with_parent(*, grandparent: bool = True, by: signal.Signals = signal.SIGTERM) -> None:
    """Ask for a signal when the parent, or (unless told otherwise) the parent's parent, ends.

    DVC starts a stage through a shell, so both are watched: the kernel reports the parent's end (Linux), a
    thread the rest. Without this a killed ``dvc repro`` leaves its stage running and writing (TRAPS D4).

    Args:
        grandparent: watch the parent's parent too.
        by: the signal; SIGKILL ends even a process that is stopped.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, by)
    watched = slice(2 if grandparent else 1)
    ancestors = _ancestors()[watched]

    def watch() -> None:
        pause = threading.Event()
        while not pause.wait(_PARENT_CHECK_SECONDS):
            if _ancestors()[watched] != ancestors:
                os.kill(os.getpid(), by)
                return

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


def _ancestors() -> tuple[int, int]:
    """Process ids of the parent and of its parent (0 where that cannot be read)."""
    parent = os.getppid()
    try:
        fields = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()
        return parent, int(fields[1])
    except (OSError, IndexError, ValueError):
        return parent, 0


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGTERM into ``Interrupted``, so that locks, database runs and temporary files end properly.

    Yields:
        None, while the handler is in place (in the main thread; elsewhere nothing is installed).
    """

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Interrupted("stopped by SIGTERM; run the same command again to go on from the saved state")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
