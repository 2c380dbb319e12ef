"""Side by side: contestants run in turn, round after round, so that drift of the machine hits all alike."""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def options(description: str | None) -> argparse.ArgumentParser:
    """Make a parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--rounds", type=int, default=7)
    return parser


def synchronize(device: str) -> None:
    """Wait for the device, so that a clock read after it is true."""
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(
    contestants: Mapping[str, Callable[[], object]], rounds: int, device: str
) -> dict[str, list[float]]:
    """Time each contestant once a round, after one untimed round.

    Returns:
        name -> milliseconds, one per round.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, contestant in contestants.items():
            synchronize(device)
            start = time.perf_counter()
            contestant()
            synchronize(device)
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def spread(values: list[float], digits: int = 1) -> str:
    """Write a median with its range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def ratios(values: list[float], reference: list[float]) -> str:
    """Write the median and range of the ratios within each round."""
    return spread([a / b for a, b in zip(values, reference, strict=True)], 2)


def share(parts: list[list[float]], whole: list[float]) -> str:
    """Write the median and range of the share that some contestants take of another, within each round."""
    return spread([100 * sum(some) / all_ for *some, all_ in zip(*parts, whole, strict=True)], 0) + " %"


ROUNDS = "Medians over interleaved rounds, the range in brackets; a ratio is taken within each round."


def header(title: str, device: str, how: str = ROUNDS) -> list[str]:
    """Say where, when, with what and how the numbers came about."""
    name = torch.cuda.get_device_name() if device == "cuda" else (platform.processor() or platform.machine())
    return [
        f"# {title}",
        "",
        f"`python -m {command()}`",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {device} ({name}), {torch.get_num_threads()} CPU threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}. {how}",
        "",
    ]


def command() -> str:
    """The command line of this run, without the machine's paths."""
    return " ".join([f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Format a Markdown table."""
    return [f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *rows]] + [""]


def publish(file: str, lines: list[str]) -> None:
    """Print the report and keep it in benchmarks/results/."""
    text = "\n".join(lines).rstrip() + "\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / file).write_text(text)
