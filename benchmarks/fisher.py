"""What an exact Fisher diagonal costs, side by side in one run.

    python -m benchmarks.fisher --threads 1                    # five minutes; writes results/fisher-cpu.md
    python -m benchmarks.fisher --device cuda --dtype bf16     # results/fisher-cuda-bf16.md
    python -m benchmarks.fisher --only bert-large              # one model; with BackPACK where it is installed

Every round runs every method once, in turn, so that whatever else the machine does hits all alike. So read the
ratios, each the median over rounds of a method's time over that of plain forward+backward in the same round. On a
GPU fp32 is IEEE for all, not TF32. The peak is measured apart, on a CPU in a process of its own, over what the
model and the batch occupy. Overlap: of the top 0.5 % with the float64 one-example-at-a-time oracle, on a few
examples.
"""

import argparse
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.fisher_peers import EXPECT, FEW, LABEL, PLAIN, Method, expected_loop, plain
from benchmarks.models import DTYPES, MODELS
from benchmarks.rounds import header, options, publish, ratios, spread, synchronize, table
from pipeline.fisher import fisher_diagonal_reference
from pipeline.fisher.batches import map_leaves, moved, rows_of, size_of

CLASSES = {"minilm": 2, "bert-large": 2, "resnet18": 10, "resnet34": 10}
JOBS = {
    "cpu": [("minilm", "label"), ("resnet18", "label"), ("minilm", "expect"), ("resnet18", "expect")],
    "cuda": [("minilm", "label"), ("bert-large", "label"), ("resnet34", "label"), ("minilm", "expect"),
             ("resnet34", "expect")],
}  # fmt: skip


def prepared(name: str, chosen: argparse.Namespace) -> tuple[nn.Module, Any, int]:
    """Build a model in eval mode and its batch, the same every time."""
    torch.manual_seed(0)
    model, batch = MODELS[name](CLASSES[name])
    dtype = DTYPES[chosen.dtype]
    batch = map_leaves(batch, lambda t: t.to(dtype) if t.is_floating_point() else t)
    return model.eval().to(chosen.device, dtype), moved(batch, torch.device(chosen.device)), size_of(batch)


def rounds(name: str, methods: dict[str, Method], chosen: argparse.Namespace) -> dict[str, Any]:
    """Time every method once a round; the warm-up round also finds out who cannot.

    Returns:
        Method -> its milliseconds an example, or why it does not run.
    """
    times: dict[str, Any] = {}
    states = {}
    for label, method in methods.items():
        states[label] = prepared(name, chosen)
        try:
            method(*states[label])
            times[label] = []
        except Exception as error:  # a peer that cannot: the reason goes into the table
            times[label] = f"{type(error).__name__}: {error}".split("\n")[0][:60]
            del states[label]
    for _ in range(chosen.rounds):
        for label, state in states.items():
            synchronize(chosen.device)
            start = time.perf_counter()
            methods[label](*state)
            synchronize(chosen.device)
            examples = FEW if methods[label] is expected_loop else state[2]
            times[label].append(1e3 * (time.perf_counter() - start) / examples)
    return times


def peak(name: str, label: str, chosen: argparse.Namespace) -> float:
    """MiB that one run of a method takes over model and batch, in this process."""
    model, batch, size = prepared(name, chosen)
    method = {**LABEL, **EXPECT}[label]
    plain(model, rows_of(batch, 0, 1, size), 1)  # libraries load and pools fill outside the measurement
    if chosen.device == "cuda":
        model.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        method(model, batch, size)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    page = 4096

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    before, highest, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    scores = method(model, batch, size)
    highest = max(highest, resident())
    done.set()
    watcher.join()
    del scores
    return (highest - before) / 2**20


def peak_elsewhere(name: str, label: str, chosen: argparse.Namespace) -> str:
    """Run `peak` where nothing is left of other measurements: on a CPU in a fresh process."""
    if chosen.device == "cuda":  # its allocator counts tensors, not pages
        torch.cuda.empty_cache()
        return f"{peak(name, label, chosen):.0f}"
    command = [sys.executable, "-m", "benchmarks.fisher", "--device", chosen.device, "--dtype", chosen.dtype]
    command += ["--threads", str(chosen.threads), "--peak", name, label]
    done = subprocess.run(command, capture_output=True, text=True)
    return f"{float(done.stdout.split()[-1]):.0f}" if done.returncode == 0 else "?"


def overlap(name: str, method: Method, oracle: Tensor, chosen: argparse.Namespace) -> str:
    """Share of the oracle's top 0.5 % that a method finds, on a few examples."""
    model, batch, size = prepared(name, chosen)
    scores = method(model, rows_of(batch, 0, FEW, size), FEW)
    if scores is None:
        return "-"
    flat = torch.cat([t.flatten().cpu().double() for t in scores.values()])
    k = len(flat) // 200
    both = set(flat.topk(k).indices.tolist()) & set(oracle.topk(k).indices.tolist())
    return f"{len(both) / k:.4f}"


def measured(name: str, kind: str, chosen: argparse.Namespace) -> list[str]:
    """Measure one model and kind: a table."""
    methods = LABEL if kind == "label" else EXPECT
    times = rounds(name, methods, chosen)
    model, batch, size = prepared(name, chosen)
    oracle = fisher_diagonal_reference(model, [rows_of(batch, 0, FEW, size)], kind=kind)
    truth = torch.cat([t.flatten().cpu() for t in oracle.values()])
    rows = []
    for label, each in times.items():
        if not isinstance(each, list):
            rows.append([label, "-", "-", "-", each])
            continue
        same = kind == "label" or "expect" in label
        found = overlap(name, methods[label], truth, chosen) if same else "-"
        rows.append([
            label,
            spread(each, 2),
            ratios(each, times[PLAIN]),
            peak_elsewhere(name, label, chosen),
            found,
        ])
    lines = [f"## {name}, batch {size}, {CLASSES[name]} classes, kind={kind}", ""]
    lines += table(["method", "ms / example", "ratio to plain", "peak MiB", "overlap"], rows)
    print("\n".join(lines), flush=True)
    return lines


def main() -> None:
    """Run everything, or with --peak a single measurement of memory."""
    parser = options(__doc__)
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES), help="of the weights")
    parser.add_argument("--only", choices=list(MODELS))
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "METHOD"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    warnings.simplefilter("ignore")
    torch.backends.cudnn.allow_tf32 = False  # as fisher_diagonal computes; elsewhere that is torch's default
    if chosen.peak:
        print(peak(*chosen.peak, chosen))
        return
    jobs = JOBS[chosen.device]
    if chosen.only:
        jobs = [job for job in jobs if job[0] == chosen.only] or [(chosen.only, "label")]
    lines = header(f"Fisher diagonal, side by side, {chosen.dtype}", chosen.device)
    for name, kind in jobs:
        lines += measured(name, kind, chosen)
    parts = [
        "fisher",
        chosen.device,
        *([] if chosen.dtype == "fp32" else [chosen.dtype]),
        *([chosen.only] if chosen.only else []),
    ]
    publish("-".join(parts) + ".md", lines)


if __name__ == "__main__":
    main()
