"""Rows of Table 4 on CIFAR-10, everything on the device; needs no DVC and no MLflow.

    python -m benchmarks.table4 --data FOLDER/cifar10 --device cuda --jobs 2 --rows dense fish:0.005:fixed

The folder holds ``train.parquet`` and ``test.parquet`` of encoded images. A row is
``METHOD[:DENSITY[:MASK[:leak]]]``, the mask ``fixed`` or the epochs between two. Each row's rate is the best of
``--rates`` after ``--tune-epochs`` on a fifth of train held out, unless one rate is given. Every epoch's
checkpoint is a step of a chain, restored and compared bit for bit, as in the stage. ``--jobs`` rows share the
device, a process each. The table is written anew as each row ends, so that a run that is cut off leaves those it
finished; and every epoch of every row is printed.
"""

import argparse
import concurrent.futures
import multiprocessing
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from benchmarks.rounds import header, publish, table
from pipeline.deltas.chain import Chain
from pipeline.deltas.target import same_bits
from pipeline.errors import DivergedError
from pipeline.fisher import fisher_diagonal
from pipeline.masks.mask import Mask
from pipeline.masks.select import dense, random
from pipeline.parameters import ParameterIndex
from pipeline.tasks import cifar
from pipeline.tasks.batches import Batches, cut, shuffled
from pipeline.tasks.decode import decode
from pipeline.tasks.draws import Rows, permutation
from pipeline.tasks.image import ImageSplit, statistics
from pipeline.tasks.raw import RawSplit
from pipeline.tasks.resnet import build
from pipeline.training.device import Device, choose_device
from pipeline.training.leak import LeakyParameters
from pipeline.training.loop import fit
from pipeline.training.masked import MaskedParameters
from pipeline.training.recipe import Recipe

HEAD, WIDE = ["fc"], 2048


@dataclass(frozen=True)
class Row:
    """One row of the table: what is trained, and how its mask is chosen."""

    method: str
    density: float = 1.0
    every: int | None = None
    leak: bool = False

    @classmethod
    def of(cls, text: str) -> "Row":
        """Read ``fish:0.005:fixed`` and the like."""
        parts = text.split(":")
        method, density, mask, leak = parts + ["", "1", "fixed", ""][len(parts) :]
        return cls(method, float(density), None if mask == "fixed" else int(mask), leak == "leak")


class Bench:
    """The data on the device, and what is done with it."""

    def __init__(self, folder: Path, model: str, batch: int, examples: int, limit: int, device: Device) -> None:
        arrays = {}
        for split in ("train", "test"):
            table = pq.read_table(folder / f"{split}.parquet")[:limit]
            arrays[f"{split}_x"] = decode(RawSplit(table, str(folder)), np.arange(len(table)))[0]
            arrays[f"{split}_y"] = table.column("label").to_numpy().astype(np.int64)
        mean, std = statistics(arrays["train_x"])
        self.train, self.test = (
            ImageSplit(arrays[f"{s}_x"], torch.from_numpy(arrays[f"{s}_y"]), mean, std) for s in ("train", "test")
        )
        self.sizes = {"train": len(arrays["train_x"]), "test": len(arrays["test_x"])}
        held = self.sizes["train"] // 5
        order = permutation(self.sizes["train"], 0, 0)
        self.tune, self.rest = np.sort(order[:held]), np.sort(order[held:])
        self.name, self.batch, self.examples, self.device = model, batch, examples, device

    def model(self, seed: int) -> nn.Module:
        """The base of a seed, on the device."""
        return build(self.name, 3, 10, seed).to(self.device.device)

    def mask(self, row: Row, model: nn.Module, rows: Rows, seed: int) -> Mask:
        """Choose a row's mask on a model as it is, from some rows of train."""
        if row.method == "dense":
            return dense(ParameterIndex.of(model))
        if row.method == "random":
            return random(ParameterIndex.of(model), row.density, seed, HEAD)
        drawn = rows[permutation(len(rows), seed, 3)][: self.examples]
        batches = Batches(cut(drawn, 128), lambda _, group: self.train.batch(group, self.device.device))
        return Mask.top_k(fisher_diagonal(model, batches, examples=len(drawn)), row.density, HEAD)

    @torch.no_grad()
    def accuracy(self, model: nn.Module, split: ImageSplit, rows: Rows) -> dict[str, float]:
        """Score a model in eval mode."""
        right, place = torch.zeros((), device=self.device.device), self.device
        for group in cut(rows, WIDE):
            x, y = split.batch(group, place.device)
            with torch.autocast(place.device.type, place.autocast, enabled=place.autocast is not None):
                right += (model(x).argmax(1) == y).sum()
        return {"accuracy": float(right) / len(rows)}

    def run(
        self, row: Row, lr: float, epochs: int, seed: int, folder: Path | None
    ) -> tuple[float, list[Mapping[str, int]]]:
        """Train a row: on all of train with checkpoints in a folder, or (None) on four fifths, scored on the rest.

        Returns:
            Accuracy after the last epoch, the bytes of each checkpoint.
        """
        place, model = self.device, self.model(seed)
        rows = self.rest if folder is None else np.arange(self.sizes["train"])
        judged = (self.train, self.tune) if folder is None else (self.test, np.arange(self.sizes["test"]))
        chain = None if folder is None else Chain.create(folder / "chain", self.model(seed))
        other, numbers = self.model(seed), list[Mapping[str, int]]()

        def batches(epoch: int) -> Batches:
            def make(position: int, group: Rows) -> tuple[Tensor, Tensor]:
                drawn = int(np.random.SeedSequence((seed, epoch, position)).generate_state(1, np.uint64)[0] >> 1)
                return self.train.batch(group, place.device, lambda x: cifar.augment(x, seed=drawn))

            groups = shuffled(np.arange(len(rows)), self.batch, None, seed, epoch)
            return Batches([rows[group] for group in groups], make)

        def after(entry: Mapping[str, float], trained: nn.Module, mask: Mask) -> Mask | None:
            epoch = int(entry["epoch"])
            if chain is not None:
                print(
                    f"{row} lr {lr:g} epoch {epoch}: {entry['train_loss']:.3f} {entry['accuracy']:.4f}", flush=True
                )
            if chain is not None:
                numbers.append(chain.append(trained, mask).nbytes)
                chain.restore_(other)
                mine, theirs = other.state_dict(), trained.state_dict()
                if not all(same_bits(mine[name], theirs[name]) for name in mine):
                    raise AssertionError(f"checkpoint {epoch} does not restore to what was trained")
            due = row.every is not None and epoch % row.every == 0
            return self.mask(row, trained, rows, seed * 1000 + epoch) if due else None

        mask = self.mask(row, model, rows, seed)
        recipe = Recipe(
            epochs=epochs, lr=lr, optimizer="sgd", weight_decay=5e-4, schedule="piecewise",
            warmup=min(5 / epochs, 0.5), seed=seed,
        )  # fmt: skip
        with (LeakyParameters if row.leak else MaskedParameters)(model, mask) as masked:
            result = fit(
                model, batches, masked=masked, recipe=recipe, device=place, after_epoch=after,
                channels_last=place.device.type == "cuda", evaluate=lambda m: self.accuracy(m, *judged),
            )  # fmt: skip
        return result.history[-1]["accuracy"], numbers


def best_rate(bench: Bench, row: Row, rates: list[float], epochs: int) -> float:
    """Choose a row's rate on the held-out fifth of train; the lower one where two are equal."""
    if len(rates) == 1:
        return rates[0]
    scores = {}
    for rate in sorted(rates):
        try:
            scores[rate] = bench.run(row, rate, epochs, 0, None)[0]
        except DivergedError:
            scores[rate] = 0.0
    print(f"{row}: tuned {scores}", flush=True)
    return max(scores, key=lambda rate: scores[rate])


def train_row(args: argparse.Namespace, text: str) -> list[str]:
    """Tune a row and train it for every seed; a process may do this for several rows in turn.

    Returns:
        The cells of its line.
    """
    torch.set_num_threads(args.threads)
    bench, row = _bench(args), Row.of(text)
    begun = time.monotonic()
    lr, tuned = best_rate(bench, row, args.rates, args.tune_epochs), time.monotonic()
    scores, numbers = [], list[Mapping[str, int]]()
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            try:
                score, numbers = bench.run(row, lr, args.epochs, seed, Path(folder))
            except DivergedError as error:
                print(f"{text}: {error}", flush=True)
                continue
        scores.append(score)
    told = "diverged" if not scores else f"{100 * np.mean(scores):.2f}"
    told += f" ± {100 * np.std(scores, ddof=1):.2f}" if len(scores) > 1 else ""
    size = f"{np.mean([sum(n.values()) for n in numbers]) / 1e3:,.0f}" if scores else "–"
    took = f"{tuned - begun:.0f} + {time.monotonic() - tuned:.0f}"
    return [text, f"{lr:g}", str(len(scores)), told, size, took]


_benches: dict[Path, Bench] = {}  # of a process: decoding takes seconds


def _bench(args: argparse.Namespace) -> Bench:
    if args.data not in _benches:
        device = choose_device(args.device)
        _benches[args.data] = Bench(args.data, args.model, args.batch, args.examples, args.limit, device)
    return _benches[args.data]


def main() -> None:
    """Train the rows and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=int, default=50_000, help="images of each split at most")
    parser.add_argument("--model", default="resnet34")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--examples", type=int, default=1024)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.4, 0.2, 0.08, 0.04, 0.02])
    parser.add_argument("--tune-epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rows", nargs="+", default=["dense", "fish:0.005:fixed", "fish:0.005:1"])
    args = parser.parse_args()
    images = min(args.limit, pq.read_metadata(args.data / "train.parquet").num_rows)
    title = f"Rows of Table 4: {args.model}, {args.epochs} epochs, {images:,} training images"
    columns = ["row", "lr", "n", "accuracy, %", "kB a checkpoint", "s to tune + train"]
    lines: dict[str, list[str]] = {}
    with concurrent.futures.ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(partial(train_row, args), text) for text in args.rows]
        for future in concurrent.futures.as_completed(futures):
            if (error := future.exception()) is not None:  # the other rows go on
                print(f"{type(error).__name__}: {error}", flush=True)
                continue
            line = future.result()
            lines[line[0]] = line
            how = "Test accuracy after the last epoch; each epoch's checkpoint restored exactly. "
            told = header(title, args.device, f"{how}{args.jobs} rows at once.")
            there = [lines[text] for text in args.rows if text in lines]
            publish(f"table4-{args.device}.md", [*told, *table(columns, there)])


if __name__ == "__main__":
    main()
