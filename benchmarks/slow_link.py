"""Two workers joined by a slow link: time and bytes to a given accuracy, for four ways to train together.

    fishmask fetch --task words
    python -m benchmarks.slow_link                  # as root, for namespaces; tunes, then over an hour on the link
    python -m benchmarks.slow_link --draw           # draws again what was measured

DDP and PowerSGD are torch's own DistributedDataParallel, plain and with its rank-1 hook; dense and FISH local SGD
are ``LocalSGD`` on a mask of everything and of 0.5 %. All train MiniLM-L6 on ``words`` with the same shards,
epochs, batches, schedule and seeds, each at its own rate, found on a part of train. The workers live in two
network namespaces (``benchmarks.link``). Writes results/slow-link.json, .md and .svg.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.link import End, linked, missing
from benchmarks.rounds import RESULTS, publish
from benchmarks.slow_link_figure import draw, rows_of
from benchmarks.slow_link_worker import WAYS, Setup
from pipeline.runtime.process import interruptible

PORT = 29400


def main() -> None:
    """Tune, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fetched", default="artifacts/fetch/words", help="what fetch wrote")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tuning-seeds", type=int, default=2)
    parser.add_argument("--mbit", type=float, default=20)
    parser.add_argument("--delay-ms", type=float, default=20, help="each way")
    parser.add_argument("--every", type=int, default=4, help="local steps between merges")
    parser.add_argument("--target", type=float, default=0.85, help="the given accuracy")
    parser.add_argument(
        "--ways", nargs="*", default=list(WAYS), choices=WAYS, help="only these, beside what is kept"
    )
    parser.add_argument(
        "--kept", type=Path, default=RESULTS / "slow-link.json", help="where measurements are kept"
    )
    parser.add_argument("--keep-rates", action="store_true", help="of the last measurement; no tuning")
    parser.add_argument("--note", default="", help="what a reader must know of this measurement")
    parser.add_argument("--draw", action="store_true", help="draw the last measurement again")
    chosen: Any = parser.parse_args()
    kept = chosen.kept
    if not chosen.draw:
        if reason := missing():
            raise SystemExit(f"benchmarks.slow_link: {reason}")
        setup = Setup(fetched=str(Path(chosen.fetched).resolve()), every=chosen.every)
        before = json.loads(kept.read_text()) if kept.exists() and chosen.keep_rates else {"runs": []}
        tuning = before["tuning"] if chosen.keep_rates else tuned(setup, chosen.tuning_seeds)
        document = {
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "machine": f"{os.cpu_count()} {platform.machine()} CPU cores, one thread a worker, "
            f"torch {torch.__version__}, Python {platform.python_version()}",
            "link": {"mbit": chosen.mbit, "delay_ms": chosen.delay_ms},
            "target": chosen.target,
            "setup": {k: v for k, v in asdict(setup).items() if k not in ("fetched", "interface")},
            "rows": rows_of_task(setup),
            "tuning": tuning,
            "note": chosen.note,
            "runs": [run for run in before["runs"] if run["way"] not in chosen.ways],
        }
        with interruptible(), linked(chosen.mbit, chosen.delay_ms) as ends:
            measure(ends, setup, document, chosen.ways, list(range(chosen.seeds)), kept)
    document = json.loads(kept.read_text())
    (RESULTS / "slow-link.svg").write_text(draw(document))
    publish("slow-link.md", report(document))


def tuned(setup: Setup, seeds: int) -> dict[str, Any]:
    """Find the rates, without the link: it does not change what is computed.

    Returns:
        Contestant -> best and tried.
    """
    with tempfile.TemporaryDirectory() as folder:
        job, out = Path(folder) / "job.json", Path(folder) / "out.jsonl"
        job.write_text(
            json.dumps({"setup": asdict(setup), "ways": list(WAYS), "seeds": list(range(seeds)), "out": str(out)})
        )
        command = torchrun("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2")
        subprocess.run([*command, "-m", "benchmarks.slow_link_worker", str(job)], check=True, env=environment())
        found: dict[str, Any] = json.loads(out.read_text())
    return found


def measure(
    ends: tuple[End, End], setup: Setup, document: dict[str, Any], ways: list[str], seeds: list[int], kept: Path
) -> None:
    """Run every contestant over the link, seed by seed; what is done is kept after each seed."""
    rates = {way: found["best"] for way, found in document["tuning"].items() if way in ways}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            job, out = Path(folder) / "job.json", Path(folder) / f"{seed}.jsonl"
            wired = asdict(replace(setup, interface=ends[0].interface))
            job.write_text(json.dumps({"setup": wired, "seeds": [seed], "rates": rates, "out": str(out)}))
            agents = [
                subprocess.Popen(
                    end.command(
                        *torchrun(
                            "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
                            "--rdzv-endpoint", f"{ends[0].address}:{PORT}", "--rdzv-id", f"seed{seed}",
                            "--rdzv-conf", f"is_host={int(end is ends[0])}", "--local-addr", end.address,
                        ),
                        "-m", "benchmarks.slow_link_worker", str(job),
                    ),
                    env=environment() | {"GLOO_SOCKET_IFNAME": end.interface},
                )
                for end in ends
            ]  # fmt: skip
            if any([agent.wait() for agent in agents]):
                raise SystemExit("benchmarks.slow_link: a worker failed; its message stands above")
            for line in out.read_text().splitlines():
                document["runs"].append({k: v for k, v in json.loads(line).items() if k != "setup"})
            kept.parent.mkdir(exist_ok=True)
            kept.write_text(json.dumps(document, indent=1) + "\n")


def torchrun(*arguments: str) -> list[str]:
    """Name torchrun by this interpreter."""
    return [sys.executable, "-m", "torch.distributed.run", *arguments]


def environment() -> dict[str, str]:
    """One thread a worker, whatever the kernel's SIMD."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}


def rows_of_task(setup: Setup) -> dict[str, int]:
    """Count the rows that are trained and judged on.

    Returns:
        Split -> rows.
    """
    manifest = json.loads((Path(setup.fetched) / "manifest.json").read_text())
    return {split: manifest["splits"][split]["rows"] for split in ("train", "validation")}


def report(document: dict[str, Any]) -> list[str]:
    """Write the table, and all that a reader must know of how it came about."""
    link, setup, target = document["link"], document["setup"], document["target"]
    seeds = len({run["seed"] for run in document["runs"]})
    lines = [
        "# Training together over a slow link",
        "",
        "`python -m benchmarks.slow_link`",
        "",
        "![Accuracy against seconds and against bytes](slow-link.svg)",
        "",
        f"{document['date']}. Two workers in two network namespaces, joined by a link of {link['mbit']:g} Mbit/s "
        f"and {link['delay_ms']:g} ms each way (tbf on veth, and a process that holds packets). "
        f"{document['machine']}. "
        f"{setup['model'].partition(':')[2]}, 22.7 M parameters; `words`, {document['rows']['train']} training "
        f"rows, half for each worker, {setup['epochs']} epochs of batches of {setup['batch']}; scored on "
        f"{document['rows']['validation']} rows. {seeds} seeds; medians, the range in brackets. Local SGD merges "
        f"every {setup['every']} steps.",
        "",
        *rows_of(document),
        "Seconds are rank 0's, evaluation left out, scoring for the mask (256 examples) counted. Bytes are the "
        "interfaces' own, of both ends, headers included. PowerSGD is torch's, rank 1: with warm start and error "
        "feedback its first two steps send the whole gradient. Rates: "
        + ", ".join(f"{way} {found['best']:g}" for way, found in document["tuning"].items())
        + f", each the best of its search on a fifth of train. Target: {target:.0%}.",
    ]
    return [*lines, "", document["note"]] if document["note"] else lines


if __name__ == "__main__":
    main()
