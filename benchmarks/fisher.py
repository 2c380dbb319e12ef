"""What an exact Fisher diagonal costs, side by side in one run.

Command: python benchmarks/fisher.py [--rounds N] [--device cpu] [--threads N] [--only bert|resnet18]
Runtime: about five minutes on one CPU thread with 5 rounds.
Result: a table on stdout and in benchmarks/results/fisher-<device>.md.

Every round runs every method once, in turn, so that whatever else the machine does hits all alike. So read the
ratios, each the median over rounds of a method's time over that of plain forward+backward in the same round. The
peak is measured in a process of its own, over what the model and the batch occupy.
"""

import argparse
import datetime
import platform
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.fisher import fisher_diagonal, fisher_diagonal_reference  # noqa: E402
from pipeline.fisher.batches import leaves_of, moved, rows_of  # noqa: E402
from pipeline.losses import example_losses, losses_from, outputs_of  # noqa: E402

Method = Callable[[nn.Module, Any, int], dict[str, Tensor] | None]
FEW = 4  # examples of the expected Fisher's one-example loop, and of the comparison with the oracle


def bert(classes: int) -> tuple[nn.Module, Any, int]:
    """MiniLM-L6's shape: 6 layers of 384, 12 heads, 22.7 M parameters; 16 sequences of 128 tokens."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=classes
    )
    ids = torch.randint(config.vocab_size, (16, 128))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(classes, (16,))}
    return BertForSequenceClassification(config), batch, 16


def resnet18(classes: int) -> tuple[nn.Module, Any, int]:
    """ResNet-18 with a 3x3 stem of stride 1, 11.2 M parameters; 32 images of 32x32."""
    from torchvision.models import resnet18 as build

    model = build(num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    return model, (torch.randn(32, 3, 32, 32), torch.randint(classes, (32,))), 32


MODELS = {"bert": bert, "resnet18": resnet18}


def plain(model: nn.Module, batch: Any, size: int) -> None:
    """The limit: one batched forward and backward."""
    model.zero_grad(set_to_none=True)
    example_losses(model, batch).mean().backward()
    model.zero_grad(set_to_none=True)


def ours(kind: str) -> Method:
    """Make a method of fisher_diagonal."""
    return lambda model, batch, size: fisher_diagonal(model, [batch], kind=kind)


def loop(model: nn.Module, batch: Any, size: int) -> dict[str, Tensor]:
    """The method's first implementation: one example at a time, squares accumulated."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(size):
        model.zero_grad(set_to_none=True)
        example_losses(model, rows_of(batch, n, n + 1, size)).sum().backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                total[name] += p.grad.square()
    model.zero_grad(set_to_none=True)
    return {name: t / size for name, t in total.items()}


def expected_loop(model: nn.Module, batch: Any, size: int) -> dict[str, Tensor]:
    """The same for the expected Fisher: every class of every example (of a few examples, to be done today)."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(FEW):
        logs = outputs_of(model, rows_of(batch, n, n + 1, size))[0].log_softmax(0)
        for log in logs:
            model.zero_grad(set_to_none=True)
            log.backward(retain_graph=True)
            for name, p in model.named_parameters():
                if p.grad is not None:
                    total[name] += log.detach().exp() * p.grad.square()
    model.zero_grad(set_to_none=True)
    return {name: t / FEW for name, t in total.items()}


def by_vmap(model: nn.Module, batch: Any, size: int) -> dict[str, Tensor]:
    """torch.func.vmap(grad), four examples at a time."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    if isinstance(
        batch, dict
    ):  # vmap cannot follow what transformers asks of a mask; here all tokens count anyway
        batch = {key: value for key, value in batch.items() if key != "attention_mask"}
    keys = list(batch) if isinstance(batch, dict) else None

    def loss(parameters: dict[str, Tensor], *rows: Tensor) -> Tensor:
        if keys is None:
            return losses_from(functional_call(model, parameters, (rows[0][None],)), rows[1][None]).sum()
        inputs = {key: row[None] for key, row in zip(keys, rows, strict=True)}
        labels = inputs.pop("labels")
        return losses_from(functional_call(model, parameters, (), inputs).logits, labels).sum()

    tensors = list(leaves_of(batch))
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for start in range(0, size, 4):
        part = [t[start : start + 4] for t in tensors]
        grads = vmap(grad(loss), in_dims=(None, *[0] * len(part)), randomness="same")(parameters, *part)
        for name, g in grads.items():
            total[name] += g.square_().sum(0)
    return {name: t / size for name, t in total.items()}


def by_backpack(model: nn.Module, batch: Any, size: int) -> dict[str, Tensor]:
    """BackPACK's SumGradSquared."""
    from backpack import backpack, extend
    from backpack.extensions import SumGradSquared

    if not getattr(model, "extended", False):
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # its hooks make views, which cannot be changed in place
        extend(model, use_converter=True)
        model.extended = True
    criterion = extend(nn.CrossEntropyLoss(reduction="sum"))
    targets = batch["labels"] if isinstance(batch, dict) else batch[1]
    with backpack(SumGradSquared()):
        criterion(outputs_of(model, batch), targets).backward()
    scores = {name: p.sum_grad_squared / size for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return scores


LABEL: dict[str, Method] = {
    "plain forward+backward": plain,
    "fisher_diagonal": ours("label"),
    "one example at a time": loop,
    "torch.func.vmap(grad)": by_vmap,
    "BackPACK SumGradSquared": by_backpack,
}
EXPECT: dict[str, Method] = {
    "plain forward+backward": plain,
    "fisher_diagonal": ours("label"),
    "fisher_diagonal, expect": ours("expect"),
    "expect, one example at a time": expected_loop,
}


def prepared(name: str, classes: int, device: str) -> tuple[nn.Module, Any, int]:
    """Build a model in eval mode and its batch, the same every time."""
    torch.manual_seed(0)
    model, batch, size = MODELS[name](classes)
    return model.eval().to(device), moved(batch, torch.device(device)), size


def synchronised(device: str) -> float:
    """Read the clock when the device has nothing left to do."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def rounds(name: str, classes: int, methods: dict[str, Method], count: int, device: str) -> dict[str, Any]:
    """Time every method once a round; the warm-up round also finds out who cannot.

    Returns:
        Method -> its seconds, or why it does not run.
    """
    times: dict[str, Any] = {}
    states = {}
    for label, method in methods.items():
        states[label] = prepared(name, classes, device)
        try:
            method(*states[label])
            times[label] = []
        except Exception as error:  # a peer that cannot: the reason goes into the table
            times[label] = f"{type(error).__name__}: {error}".split("\n")[0][:60]
    for _ in range(count):
        for label, method in methods.items():
            if isinstance(times[label], list):
                start = synchronised(device)
                method(*states[label])
                times[label].append(synchronised(device) - start)
    return times


def peak(name: str, classes: int, label: str, device: str) -> float:
    """MiB that one run of a method takes over model and batch, in this process."""
    model, batch, size = prepared(name, classes, device)
    method = {**LABEL, **EXPECT}[label]
    small = rows_of(batch, 0, 1, size)
    plain(model, small, 1)  # libraries load and pools fill outside the measurement
    if device == "cuda":
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


def peak_elsewhere(name: str, classes: int, label: str, device: str, threads: int) -> str:
    """Run `peak` in a fresh process."""
    command = [sys.executable, __file__, "--device", device, "--threads", str(threads)]
    command += ["--peak", name, str(classes), label]
    try:
        return (
            f"{float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]):.0f}"
        )
    except (subprocess.CalledProcessError, ValueError, IndexError):
        return "?"


def overlap(name: str, classes: int, label: str, device: str, oracle: Tensor) -> str:
    """Share of the oracle's top 0.5 % that a method finds, on a few examples."""
    method = {**LABEL, **EXPECT}[label]
    model, batch, size = prepared(name, classes, device)
    scores = method(model, rows_of(batch, 0, FEW, size), FEW)
    if scores is None:
        return "-"
    flat = torch.cat([t.flatten().cpu().double() for t in scores.values()])
    k = len(flat) // 200
    both = set(flat.topk(k).indices.tolist()) & set(oracle.topk(k).indices.tolist())
    return f"{len(both) / k:.4f}"


def table(name: str, classes: int, kind: str, arguments: argparse.Namespace) -> list[str]:
    """Measure one model and kind."""
    methods = LABEL if kind == "label" else EXPECT
    times = rounds(name, classes, methods, arguments.rounds, arguments.device)
    model, batch, size = prepared(name, classes, arguments.device)
    oracle = fisher_diagonal_reference(model, [rows_of(batch, 0, FEW, size)], kind=kind)
    truth = torch.cat([t.flatten().cpu() for t in oracle.values()])
    lines = [
        f"\n### {name}, batch {size}, {classes} classes, kind={kind}\n",
        "| method | ms / example | spread | ratio to plain (min - max) | peak MiB | overlap |",
        "|---|---|---|---|---|---|",
    ]
    first = times["plain forward+backward"]
    for label, seconds in times.items():
        if not isinstance(seconds, list):
            lines.append(f"| {label} | - | - | - | - | {seconds} |")
            continue
        each = FEW if methods[label] is expected_loop else size
        ms = [1e3 * s / each for s in seconds]
        ratios = [m / (1e3 * p / size) for m, p in zip(ms, first, strict=True)]
        same = "expect" in label if kind == "expect" else "expect" not in label
        found = overlap(name, classes, label, arguments.device, truth) if same else "-"
        lines.append(
            f"| {label} | {statistics.median(ms):.1f} | {min(ms):.1f} - {max(ms):.1f} | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f}) | "
            f"{peak_elsewhere(name, classes, label, arguments.device, arguments.threads)} | {found} |"
        )
    print("\n".join(lines), flush=True)
    return lines


def header(arguments: argparse.Namespace) -> list[str]:
    """Say what was measured where."""
    import torchvision
    import transformers

    device = torch.cuda.get_device_name() if arguments.device == "cuda" else processor()
    return [
        "# Fisher diagonal, side by side\n",
        f"- device: {arguments.device}, {device}, {arguments.threads} thread(s)",
        f"- python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"transformers {transformers.__version__}, fp32",
        f"- date: {datetime.date.today()}",
        f"- command: python benchmarks/fisher.py --rounds {arguments.rounds} --device {arguments.device} "
        f"--threads {arguments.threads}",
        f"- medians over {arguments.rounds} interleaved rounds; spread and brackets: smallest - largest",
        f"- overlap: of the top 0.5 % with the float64 one-example-at-a-time oracle, on {FEW} examples",
    ]


def processor() -> str:
    """Name the CPU."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    """Run everything, or with --peak a single measurement of memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--peak", nargs=3, metavar=("MODEL", "CLASSES", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    if arguments.peak:
        print(peak(arguments.peak[0], int(arguments.peak[1]), arguments.peak[2], arguments.device))
        return
    lines = header(arguments)
    print("\n".join(lines), flush=True)
    jobs = [("bert", 2, "label"), ("resnet18", 10, "label"), ("bert", 2, "expect"), ("resnet18", 10, "expect")]
    for name, classes, kind in jobs:
        if arguments.only in (None, name):
            lines += table(name, classes, kind, arguments)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / f"fisher-{arguments.device}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
