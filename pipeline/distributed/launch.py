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
``GLOO_SOCKET_IFNAME`` where a machine has several network interfaces.

Faults: a worker that dies ends the run with one line and the other workers with it; one that hangs, or cannot be
reached, makes the others' exchange fail after ``timeout`` seconds. Every worker ends with the process that started
it. The same command goes on from the last merge that was saved, and so do torchrun's ``--max-restarts``.
"""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pipeline.distributed.collectives import Collectives
from pipeline.errors import Interrupted, WorkerError
from pipeline.process import end_with_parent

TIMEOUT = 300.0
"""Seconds that an exchange may take; rank 0's evaluation and saving count, the others wait for it."""

_GRACE = 10  # seconds that torchrun leaves the others to end before it kills them


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
        WorkerError: if a worker failed more often than that: its exit code is the worker's own, whose message
            stands on stderr; or says which signal killed it.
        Interrupted: if this process was asked to stop; the workers have ended.
    """  # noqa: DOC502 - made by _failure
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # its boxes would hide the line that matters
    arguments = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(workers)]
    arguments += ["--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    parser: Any = run.get_args_parser()
    if "--shutdown-timeout" in parser._option_string_actions:  # torch >= 2.10
        arguments += ["--shutdown-timeout", str(_GRACE)]
    share = {"OMP_NUM_THREADS": str(max(1, threads // workers)), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    if sys.platform == "linux":
        share["GLOO_SOCKET_IFNAME"] = "lo"
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with _environment(share):
        try:
            run.run(run.parse_args([*arguments, "-m", *(command or this_command())]))
        except ChildFailedError as error:
            failed: WorkerError = _failure(error.failures)
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
def joined(timeout: float = TIMEOUT, *, cuda: bool = False) -> Iterator[Collectives]:
    """Be a worker while the block runs: NCCL where every worker of this machine has a GPU of its own, else gloo.

    Args:
        timeout: seconds that an exchange may take before the others count as dead.
        cuda: whether the model will be on a GPU.

    Yields:
        The ranks.

    Raises:
        WorkerError: if the workers do not find each other.
    """
    end_with_parent(grandparent=False)
    own = cuda and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if own:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        dist.init_process_group("nccl" if own else "gloo", timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise WorkerError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: the workers did not meet at {where} within "
            f"{timeout:g} s ({first}); check the address, the firewall and that all were started"
        ) from None
    yield Collectives()
    dist.destroy_process_group()  # after a failure the process ends anyway, and this could wait for the dead


def _failure(failures: dict[int, Any]) -> WorkerError:
    """Say which worker failed first, and of what."""
    # The others fail in its wake: by losing touch (our own code), or by torchrun's SIGTERM.
    rank, worst = min(
        failures.items(), key=lambda item: (item[1].exitcode in (WorkerError.code, -15), item[1].timestamp)
    )
    if worst.exitcode < 0:
        how = f"was killed by {signal.Signals(-worst.exitcode).name}"
        rest = "out of memory, perhaps" if worst.exitcode == -signal.SIGKILL else "see the lines above"
    else:
        how, rest = f"failed with exit code {worst.exitcode}", "its message stands above"
    error = WorkerError(
        f"worker {rank} (process {worst.pid}) {how} ({rest}); the others were ended; run the same command again "
        "to go on from the last merge"
    )
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
