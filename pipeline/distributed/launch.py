"""Starting the workers of a run, and being one of them.

On one machine ``launch`` starts torchrun itself: a free port on the loopback interface, one process per worker,
each running the very command that was given. On several machines start that command under your own torchrun, one
per machine; with RANK and WORLD_SIZE in the environment it is a worker::

    torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29400 --rdzv-id run1 \
        -m pipeline.cli distribute --task digits --method fish

or under Slurm, with the first node's address as the meeting point::

    srun --nodes 2 --ntasks-per-node 1 torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d \
        --rdzv-endpoint "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):29400" \
        --rdzv-id "$SLURM_JOB_ID" -m pipeline.cli distribute --task digits --method fish

Every machine needs the project, its fetched data, and the same versions; rank 0's writes the results. Set
``GLOO_SOCKET_IFNAME`` where a machine has several network interfaces, and ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1``
where torchrun is to restart workers on several machines.

Faults: a worker that dies ends the run with one line and the other workers with it; one that hangs, or cannot be
reached, makes the others' exchange fail after ``timeout`` seconds. Every worker ends with the process that started
it. The same command goes on from the last merge that was saved, and so do torchrun's ``--max-restarts``.
"""

import contextlib
import hashlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from pipeline.distributed.collectives import Collectives
from pipeline.errors import MENDABLE, FishmaskError, Interrupted, WorkerError
from pipeline.runtime.process import end_with_parent

TIMEOUT = 300.0
"""Seconds that an exchange may take; rank 0's evaluation and saving count, the others wait for it."""

_IN_THE_WAKE = (WorkerError.code, Interrupted.code, -signal.SIGTERM)  # how workers end after another one failed

GRACE = 20.0
"""Seconds that a worker may go on after SIGTERM, for the step under way and a save."""


def is_worker() -> bool:
    """Tell whether this process was started by torchrun, hence is a worker."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(workers: int, command: Sequence[str] | None = None, *, restarts: int = 0, threads: int = 1) -> None:
    """Start workers under torchrun on this machine, and wait for them.

    Args:
        workers: how many.
        command: module and arguments of each; None: those of this process.
        restarts: how often all workers are started again after one of them failed.
        threads: CPU threads of all workers together; each gets its share, at least one.

    Raises:
        SystemExit: if a worker failed more often than that and said why in its own line; with its exit code.
        WorkerError: if it was killed, or lost the others, or ended in a traceback; says which worker, and how.
        Interrupted: if this process was asked to stop; the workers have ended.
    """  # noqa: DOC502 - made by _failure
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # its boxes would hide the line that matters
    arguments = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(workers)]
    arguments += ["--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    share = {"OMP_NUM_THREADS": str(max(1, threads // workers))}
    if sys.platform == "linux":
        share["GLOO_SOCKET_IFNAME"] = "lo"
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with _environment(share):
        try:
            run.run(run.parse_args([*arguments, "-m", *(command or this_command())]))
        except ChildFailedError as error:
            failed: BaseException = _failure(error.failures)
            raise failed from None
        except (SignalException, KeyboardInterrupt):
            raise Interrupted(
                "stopped, and the workers with it; run the same command again to go on from the last merge"
            ) from None
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def this_command() -> list[str]:
    """Name the module and the arguments that this process runs.

    Returns:
        As ``python -m`` takes them.
    """
    spec = sys.modules["__main__"].__spec__
    return [spec.name if spec is not None else "pipeline.cli", *sys.argv[1:]]


@contextlib.contextmanager
def joined(timeout: float = TIMEOUT, *, cuda: bool = False, grace: float = GRACE) -> Iterator[Collectives]:
    """Be a worker while the block runs: NCCL where every worker of this machine has a GPU of its own, else gloo.

    Args:
        timeout: seconds that an exchange may take before the others count as dead.
        cuda: whether the model will be on a GPU.
        grace: seconds after SIGTERM at which a worker that still runs (it hangs) is killed.

    Yields:
        The ranks.

    Raises:
        WorkerError: if the workers do not find each other.
        FishmaskError: what the block raises, where no other worker of this machine raised the same.
        SystemExit: else, with the error's code; and after a SIGTERM, whose reason the launcher tells.
    """
    end_with_parent(grandparent=False, by=signal.SIGKILL)  # its state is that of the last save, at any moment
    _kill_late(grace)
    own = cuda and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if own:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
        # torchrun keeps its store over a restart: without a prefix, ranks would find their predecessors
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if _one_node() else "0"
        store = PrefixStore(f"attempt-{attempt}", store)
        limit = timedelta(seconds=timeout)
        dist.init_process_group("nccl" if own else "gloo", store=store, rank=rank, world_size=size, timeout=limit)
    except (RuntimeError, ValueError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise WorkerError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: the workers did not meet at {where} within "
            f"{timeout:g} s ({first}); check the address, the firewall and that all were started"
        ) from None
    try:
        yield Collectives()
    except FishmaskError as error:
        if isinstance(error, Interrupted) or _said(store, str(error)):
            raise SystemExit(error.code) from None
        raise
    dist.destroy_process_group()  # after a failure the process ends anyway, and this could wait for the dead


def _said(store: PrefixStore, line: str) -> bool:
    """Tell whether another worker of this machine says the same: bad input is said once."""
    digest = hashlib.blake2b(line.encode(), digest_size=8).hexdigest()
    try:
        return int(store.add(f"said-{os.environ.get('GROUP_RANK', '0')}-{digest}", 1)) > 1
    except RuntimeError:  # its host has ended
        return False


def _kill_late(grace: float) -> None:
    """End this process some seconds after SIGTERM, whatever it does: a worker that hangs would outlive its run."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # The interpreter writes the number of a signal here at once, even where the main thread is stuck.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while os.read(reader, 1)[0] != signal.SIGTERM:
            pass
        time.sleep(grace)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="kill-late").start()


def _one_node() -> bool:
    """Tell whether all workers are on this machine: agents of several count restarts each for itself."""
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]


def _failure(failures: dict[int, Any]) -> BaseException:
    """Say which worker failed first, and of what, unless it said so itself."""
    # The others fail in its wake: by losing touch (our own code), or by torchrun's SIGTERM.
    rank, worst = min(failures.items(), key=lambda item: (item[1].exitcode in _IN_THE_WAKE, item[1].timestamp))
    if worst.exitcode in MENDABLE:
        return SystemExit(worst.exitcode)
    again = "; run the same command again to go on from the last merge"
    if worst.exitcode < 0:
        how = f"was killed by {signal.Signals(-worst.exitcode).name}"
        how += " (out of memory, perhaps)" if worst.exitcode == -signal.SIGKILL else ""
    else:
        how = f"failed with exit code {worst.exitcode}: its message stands above"
    error = WorkerError(f"worker {rank} (process {worst.pid}) {how}; the others were ended{again}")
    error.code = worst.exitcode if worst.exitcode > 0 else WorkerError.code
    return error


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables that are not set yet, for the processes started in the block."""
    new = {key: value for key, value in values.items() if key not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for key in new:
            os.environ.pop(key, None)
