"""One reduction between workers: what the mask covers, everything, pairs of index and value, PowerSGD.

    python -m benchmarks.reduction                   # 2 and 4 processes, some minutes; results/reduction-cpu.md
    python -m benchmarks.reduction --device cuda     # processes sharing the GPU over gloo; NCCL if each has one

The model is a MiniLM-shaped BERT, 22.7 M parameters, mask 0.5 %. A reduction goes from trained values in the model
to merged values in the model, gather and scatter included; the dense all-reduce is given a flat vector for
nothing. A time is that of the slowest rank. Bytes are those of all ranks: as counted by the project at its
collectives, and as counted by the loopback interface of a network namespace of the run's own, where one can be
made (root), headers included.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.rounds import header, options, publish, ratios, spread, synchronize, table
from benchmarks.step import minilm
from pipeline.distributed.launch import joined
from pipeline.distributed.local_sgd import LocalSGD
from pipeline.distributed.own_masks import interleaved, random_scores
from pipeline.masks import select
from pipeline.parameters import ParameterIndex
from pipeline.training.masked import MaskedParameters

DENSITY, HEAD = 0.005, ["classifier"]
DENSE, SPARSE = "dense all-reduce (bare)", "mask, fp32"


@dataclass(frozen=True)
class Contestant:
    """A way to reduce.

    Attributes:
        change: makes something to reduce; not timed.
        reduce: the reduction.
        counted: bytes that this rank has handed over so far by the project's count; None where it has none.
        plain: the part of ``reduce`` that is no reduction, timed apart and taken off.
    """

    change: Callable[[], object]
    reduce: Callable[[], object]
    counted: Callable[[], int] | None = None
    plain: Callable[[], object] | None = None


def contestants(rank: int, size: int, device: str) -> dict[str, Contestant]:
    """Build every contestant on a model of its own.

    Returns:
        Name -> contestant.
    """
    base = minilm(torch.float32, device)
    index = ParameterIndex.of(base)
    shared = select.random(index, DENSITY, 0, HEAD)
    mine = interleaved(random_scores(index, 0), DENSITY, size, rank, HEAD)
    found: dict[str, Contestant] = {}

    flat = torch.randn(index.total, device=device)

    def all_reduce() -> None:
        dist.all_reduce(flat)
        flat.div_(size)

    found[DENSE] = Contestant(lambda: None, all_reduce)
    for name, mask, how in (
        ("mask of everything, fp32", select.dense(index), {}),
        (SPARSE, shared, {}),
        ("mask, bf16 with error feedback", shared, {"dtype": torch.bfloat16}),
        ("disjoint masks, over their union", mine, {"own_masks": True}),
    ):
        masked = MaskedParameters(copy.deepcopy(base), mask)
        sync = LocalSGD(masked, torch.optim.SGD([masked.values], lr=0.1), every=1, **how)
        found[name] = Contestant(
            lambda m=masked: m.values.data.add_(1e-3 * torch.randn_like(m.values)), sync.step,
            lambda s=sync: s.bytes_sent,
        )  # fmt: skip
    found["all-gather of indices and values"] = pairs(copy.deepcopy(base), size, rank)
    found["PowerSGD rank 1 (torch)"] = power_sgd(copy.deepcopy(base))
    return found


def pairs(model: nn.Module, size: int, rank: int) -> Contestant:
    """Sparse updates as they are usually sent: every rank's int32 indices and fp32 values, to all.

    Returns:
        The contestant.
    """
    masked = MaskedParameters(model, select.random(ParameterIndex.of(model), DENSITY, rank, HEAD))
    before = masked.values.detach().clone()
    index = masked.mask.index
    where = torch.cat([masked.mask.indices[n] + index.offsets[n] for n in index if masked.mask.count(n)])
    place = before.device
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def reduce() -> None:
        change = masked.values.detach() - before
        indices = [torch.empty(len(where), dtype=torch.int32, device=place) for _ in range(size)]
        values = [torch.empty_like(change) for _ in range(size)]
        dist.all_gather(indices, where.to(place, torch.int32))
        dist.all_gather(values, change)
        for at, value in zip(indices, values, strict=True):
            flat.index_add_(0, at.long(), value, alpha=1 / size)
        masked.write_()

    return Contestant(lambda: masked.values.data.add_(1e-3), reduce)


def power_sgd(model: nn.Module) -> Contestant:
    """DDP with torch's hook: its time is that of a trivial backward with the hook less that of one without.

    Returns:
        The contestant, its warm-up done.
    """
    wrapped = DistributedDataParallel(Linear(model), bucket_cap_mb=1024)  # one bucket: more get mixed up on gloo
    state = PowerSGDState(process_group=None, matrix_approximation_rank=1, start_powerSGD_iter=2)
    wrapped.register_comm_hook(state, powerSGD_hook)
    one = torch.ones((), device=next(model.parameters()).device)

    def reduce() -> None:
        wrapped(one).backward()

    def plain() -> None:
        with wrapped.no_sync():
            wrapped(one).backward()

    def clear() -> None:
        for parameter in model.parameters():
            parameter.grad = None

    for _ in range(3):
        clear()
        reduce()
    return Contestant(clear, reduce, plain=plain)


class Linear(nn.Module):
    """A loss whose gradient costs nothing: the sum of all parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Sum up."""
        return torch.stack([p.sum() for p in self.model.parameters()]).sum() * x


def work(rounds: int, device: str, out: Path) -> None:
    """Be a worker; rank 0 writes down times and bytes of all."""
    torch.set_num_threads(1)
    with joined(300.0, cuda=device == "cuda") as world:
        everyone = contestants(world.rank, world.size, device)
        found: dict[str, dict[str, Any]] = {name: {"ms": [], "counted": [], "seen": []} for name in everyone}
        for turn in range(rounds + 1):
            for name, contestant in everyone.items():
                contestant.change()
                part = 0.0
                if contestant.plain is not None:
                    part = timed(contestant.plain, device)
                    contestant.change()
                dist.barrier()
                counted, seen = contestant.counted and contestant.counted(), loopback()
                dist.barrier()
                spent = timed(contestant.reduce, device) - part
                slowest = torch.tensor([spent], dtype=torch.float64, device=device)
                if contestant.counted is not None:
                    counted = contestant.counted() - counted
                dist.barrier()
                seen = loopback() - seen
                dist.all_reduce(slowest, dist.ReduceOp.MAX)
                if turn:
                    found[name]["ms"].append(float(slowest))
                    found[name]["counted"].append(counted and counted * world.size)
                    found[name]["seen"].append(seen)
        if world.rank == 0:
            k = select.random(ParameterIndex.of(minilm(torch.float32, "cpu")), DENSITY, 0, HEAD).nnz
            backend = dist.get_backend()
            out.write_text(json.dumps({"found": found, "k": k, "backend": backend, "size": world.size}))


def timed(call: Callable[[], object], device: str) -> float:
    """Milliseconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def loopback() -> int:
    """Bytes that went through the loopback interface so far; 0 outside a namespace of our own."""
    own = "FISHMASK_NAMESPACE" in os.environ
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text()) if own else 0


def start(workers: int, rounds: int, device: str) -> dict[str, Any]:
    """Run the workers under torchrun, in a network namespace of their own where one can be made.

    Returns:
        What rank 0 wrote down.
    """
    name = f"fm{os.getpid()}"
    own = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    try:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
                       "--nproc-per-node", str(workers), "-m", "benchmarks.reduction", "--device", device,
                       "--rounds", str(rounds), "--out", str(out)]  # fmt: skip
            env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
            if own:
                subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
                command, env = ["ip", "netns", "exec", name, *command], env | {"FISHMASK_NAMESPACE": name}
            subprocess.run(command, check=True, env=env)
            result: dict[str, Any] = json.loads(out.read_text())
            return result
    finally:
        if own:
            subprocess.run(["ip", "netns", "del", name], check=True)


def report(result: dict[str, Any]) -> list[str]:
    """Make the table of one number of workers."""
    found, size, k = result["found"], result["size"], result["k"]
    limit, dense = 2 * (size - 1) * 4 * k, found[DENSE]
    rows = []
    for name, one in found.items():
        counted, seen = one["counted"][0], statistics.median(one["seen"])
        faster = [a / b for a, b in zip(dense["ms"], one["ms"], strict=True)]
        nbytes = counted or seen
        rows.append([
            name, spread(one["ms"]), ratios(one["ms"], dense["ms"]), f"{statistics.median(faster):.1f}x",
            f"{counted / 1e6:.3f}" if counted else "-", f"{seen / 1e6:.3f}" if seen else "-",
            f"{nbytes / limit:.3f}x" if nbytes else "-",
            f"{2 * (size - 1) * 4 * PARAMETERS / nbytes:.1f}x" if nbytes else "-",
        ])  # fmt: skip
    columns = ["", "ms", "ratio to dense", "faster than dense", "MB counted", "MB on the interface",
               "bytes / (2 (W-1) 4 k)", "fewer than dense"]  # fmt: skip
    title = f"## {size} processes, {result['backend']}, k = {k:,}"
    return [title, "", *table(columns, rows)]


PARAMETERS = 22_713_986


def main() -> None:
    """Run the benchmark, or be one of its workers."""
    parser = options(__doc__)
    parser.add_argument("--workers", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    chosen: Any = parser.parse_args()
    if chosen.out is not None:
        work(chosen.rounds, chosen.device, chosen.out)
        return
    torch.set_num_threads(1)
    lines = header("One reduction, 22.7 M parameters, mask 0.5 %", chosen.device)
    for workers in chosen.workers:
        lines += report(start(workers, chosen.rounds, chosen.device))
    lines += [
        "Times: the slowest rank, from trained values in the model to merged values in the model; the bare "
        "all-reduce gets a flat vector. PowerSGD: backward of a trivial loss with the hook, less it without. "
        "Bytes over all ranks; the interface's include headers and acknowledgements. Disjoint masks: W (k - head) "
        "+ head coordinates in all. 'Fewer than dense' is against 2 (W-1) 4 n bytes.",
    ]
    publish(f"reduction-{chosen.device}.md", lines)


if __name__ == "__main__":
    main()
