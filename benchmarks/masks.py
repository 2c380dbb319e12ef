"""Masks: exact global top-k against the usual ways, and coordinates on disk against their entropy.

    python -m benchmarks.masks --threads 1                          # two minutes; writes results/masks-cpu.md
    python -m benchmarks.masks --threads 1 --mask mask.safetensors  # with masks of your own
    python -m benchmarks.masks --device cuda                        # results/masks-cuda.md

The tensors are those of a MiniLM-shaped BERT, 22.7 M parameters. Scores are products of a row's and a column's
log-normal share with noise, on a scale of each tensor's own, as Fisher scores are. Peak memory is the most a
process of its own holds beyond the scores, the result included. Roaring's bytes are computed from its layout,
within 10 % of what CRoaring writes.
"""

import resource
import subprocess
import sys
from collections.abc import Callable
from hashlib import blake2b
from math import lgamma, log
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from benchmarks.rounds import header, interleaved, options, publish, ratios, share, spread, table
from benchmarks.step import minilm
from pipeline.masks import codec, rice, select
from pipeline.masks.budget import budget
from pipeline.masks.mask import Mask
from pipeline.masks.ranking import Ranking
from pipeline.masks.squeeze import pack_integers, squeeze
from pipeline.masks.stairs import matrix_shape
from pipeline.parameters import ParameterIndex

DENSITY = 0.005


def scores_like(index: ParameterIndex, device: str) -> dict[str, Tensor]:
    """Make scores that cluster as Fisher scores do, in place, so that nothing larger was ever held."""
    torch.manual_seed(0)
    scores = {}
    for name, shape in index.shapes.items():
        rows, columns = matrix_shape(shape, index.numel(name))
        score = torch.empty(rows, columns, device=device).log_normal_(0, 0.3)
        score *= torch.empty(rows, 1, device=device).log_normal_(0, 1.5)
        score *= torch.empty(1, columns, device=device).log_normal_(0, 1.5)
        scores[name] = (score.mul_(float(torch.randn(()).mul(2).exp()))).reshape(shape)
    return scores


def ways(scores: dict[str, Tensor]) -> dict[str, Callable[[], object]]:
    """Choose the same k coordinates in each way; the last only reads every score once."""
    total = sum(score.numel() for score in scores.values())
    k = budget(DENSITY, total)

    def joined() -> Tensor:
        return torch.cat([score.reshape(-1) for score in scores.values()])

    def masks(chosen: Tensor) -> list[Tensor]:  # as the official implementation keeps them: dense, fp32
        dense = torch.zeros(total, device=chosen.device)
        dense[chosen] = 1
        return list(dense.split([score.numel() for score in scores.values()]))

    return {
        "Mask.top_k": lambda: Mask.top_k(scores, DENSITY),
        "torch.topk of the concatenation": lambda: joined().topk(k).indices.sort(),
        "the same, then dense masks (official)": lambda: masks(joined().topk(k).indices),
        "full sort": lambda: joined().sort(descending=True).indices[:k].sort(),
        "reading every score once": lambda: [score.max() for score in scores.values()],
    }


def peak(name: str, device: str) -> float:
    """Measure one way's peak memory beyond the scores, in MiB: in this process, which does nothing else."""
    scores = scores_like(ParameterIndex.of(minilm(torch.float32, "cpu")), device)
    run = ways(scores)[name]
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Mask.top_k({"warm": torch.rand(300_000)}, 0.01)  # code and pools are no memory of the method's
    floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    hold = torch.ones((floor * 1024 - resident()) // 4)  # so that what is freed already does not hide the peak
    run()
    peak_now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del hold  # alive until here
    return (peak_now - floor) / 1024


def resident() -> int:
    """Bytes of memory this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def entropy(total: int, count: int) -> float:
    """Bytes of log2 C(n, k): what a uniform choice costs at least."""
    return (lgamma(total + 1) - lgamma(count + 1) - lgamma(total - count + 1)) / log(2) / 8


def rate_model(mask: Mask) -> tuple[float, float]:
    """Bytes of a row x column rate model: independent cells of rate r_i c_j / k in each tensor, and the rates.

    Returns:
        The cells, given the rates; and the rates, at the entropy of each tensor's row and column counts.
    """
    cells = rates = 0.0
    for name, shape in mask.index.shapes.items():
        if mask.whole(name) or not mask.count(name):
            continue
        rows, columns = matrix_shape(shape, mask.index.numel(name))
        row, column = np.divmod(mask.indices[name].numpy(), columns)
        by_row, by_column = np.bincount(row, minlength=rows), np.bincount(column, minlength=columns)
        for counts in (by_row, by_column):
            share = np.unique(counts, return_counts=True)[1] / len(counts)
            rates -= len(counts) * float((share * np.log2(share)).sum())
        rate = np.clip(np.outer(by_row[by_row > 0], by_column[by_column > 0]) / mask.count(name), 0, 1 - 1e-9)
        chosen = by_row[row] * by_column[column] / mask.count(name)
        chosen = np.clip(chosen, 0, 1 - 1e-9)
        cells -= float(np.log2(1 - rate).sum() + (np.log2(chosen) - np.log2(1 - chosen)).sum())
    return cells / 8, rates / 8


def others(mask: Mask) -> dict[str, int]:
    """Bytes of partly chosen tensors in other codes: Rice's plainly, LEB128 gaps under two packers, Roaring."""
    rice_bits = roaring = 0
    gaps = []
    for name, start in mask.index.offsets.items():
        if mask.count(name) and not mask.whole(name):
            gaps.append(rice.gaps_of(mask.indices[name].numpy()))
            rice_bits += rice.best_parameter(gaps[-1])[1]
            at = mask.indices[name].numpy() + start
            for held in np.split(at, np.flatnonzero(np.diff(at >> 16)) + 1):  # a container per 2^16 elements
                runs = 1 + int((np.diff(held) > 1).sum())
                roaring += 8 + min(2 * len(held), 8192, 2 + 4 * runs)
    packed = pack_integers(np.concatenate(gaps)) if gaps else b""
    return {
        "Rice": rice_bits // 8,
        "varint + LZMA": len(squeeze(packed)),
        "varint + zstd 19": len(zstandard.compress(packed, 19)),
        "Roaring": roaring,
    }


def sizes(mask: Mask, path: Path) -> list[str]:
    """One row: what a mask costs on disk, against its bounds."""
    sections = mask.pack()
    code = sections["coordinates"].numel()
    bound = entropy(mask.index.total, mask.nnz)
    cells, rates = rate_model(mask)
    file = mask.save(path)
    return [
        f"{mask.nnz:,} of {mask.index.total:,}", f"{code:,}", f"{file:,}", f"{bound:,.0f}", f"{code / bound:.4f}",
        f"{file / bound:.4f}", f"{cells:,.0f} + {rates:,.0f}", f"{code / (cells + rates):.2f}",
    ]  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    parser = options(__doc__)
    parser.add_argument("--mask", action="append", default=[], help="a mask file to measure as well; repeatable")
    parser.add_argument("--peak", help="print the peak memory of one way, and nothing else")
    chosen: Any = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.peak:
        print(peak(chosen.peak, chosen.device))
        return
    index = ParameterIndex.of(minilm(torch.float32, "cpu"))
    scores = scores_like(index, chosen.device)
    contestants = ways(scores)
    times = interleaved(contestants, chosen.rounds, chosen.device)
    lines = header(f"Masks at {DENSITY:.1%} of {index.total:,} parameters", chosen.device)
    rows = []
    for name, own in times.items():
        command = [sys.executable, "-m", "benchmarks.masks", "--device", chosen.device, "--peak", name]
        command += ["--threads", str(chosen.threads)]
        memory = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
        rows.append([name, spread(own), ratios(own, times["Mask.top_k"]), f"{float(memory):.0f}"])
    lines += table(["exact top-k", "ms", "ratio to Mask.top_k", "peak MiB beyond the scores"], rows)

    small, large = (Mask.top_k(scores, density) for density in (DENSITY, 0.02))
    masks = {
        f"random {DENSITY:.1%}": select.random(index, DENSITY, 0),
        "random 2 %": select.random(index, 0.02, 0),
    }
    masks |= {f"clustered {DENSITY:.1%}": small, "clustered 2 %": large}
    masks |= {file: Mask.load(file) for file in chosen.mask}
    file = Path(__file__).parent / "results" / "masks.tmp"
    file.parent.mkdir(exist_ok=True)
    columns = ["mask", "coordinates", "coded bytes", "file bytes", "log2 C(n,k) bytes", "coded / that",
               "file / that", "row x column cells + rates, bytes", "coded / that"]  # fmt: skip
    lines += table(columns, [[name, *sizes(mask, file)] for name, mask in masks.items()])
    rows = []
    for name, mask in masks.items():
        code, beside = mask.pack()["coordinates"].numel(), others(mask)
        rows.append([name, f"{code:,}", *(f"{size:,} ({code / size:.2f})" for size in beside.values())])
    lines += table(["mask", "coded bytes", *(f"{way} (coded / that)" for way in beside)], rows)
    rows = []
    for name, mask in masks.items():
        sections = mask.pack()
        mask.save(file)
        data = file.read_bytes()
        speed = interleaved(
            {
                "encode": mask.pack,
                "decode": lambda sections=sections: codec.decode(sections, "benchmark"),
                "save": lambda mask=mask: mask.save(file),
                "load": lambda: Mask.load(file),
                "checksums": lambda data=data: blake2b(data, digest_size=32),
                "digest": lambda mask=mask: Mask.digest.func(mask),  # cached otherwise
            },
            chosen.rounds,
            "cpu",
        )
        shown = [spread(speed[act]) for act in ("encode", "decode", "save", "load")]
        rows.append([name, *shown, share([speed["checksums"], speed["digest"]], speed["load"])])
    columns = ["mask", "encode ms", "decode ms", "save ms", "load and verify ms", "of it checksums and digest"]
    lines += table(columns, rows)
    ranking = Ranking.of(scores)
    speed = interleaved(
        {
            "of": lambda: Ranking.of(scores),
            "save": lambda: ranking.save(file),
            "load": lambda: Ranking.load(file),
            "cut": lambda: ranking.cut(DENSITY),
        },
        chosen.rounds,
        chosen.device,
    )
    size = ranking.save(file)
    file.unlink()
    lines += table(
        ["ranking of the top 10 %", "coordinates", "file bytes", *(f"{name} ms" for name in speed)],
        [["clustered", f"{ranking.nnz:,}", f"{size:,}", *(spread(own) for own in speed.values())]],
    )
    publish(f"masks-{chosen.device}.md", lines)


if __name__ == "__main__":
    main()
