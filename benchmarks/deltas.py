"""Deltas against dense checkpoints: bytes, and the time to apply, revert and swap against loading a state dict.

    python -m benchmarks.deltas --threads 1         # half a minute; writes results/deltas-cpu.md

A MiniLM-shaped BERT (22.7 M parameters, random weights), two random masks of 0.5 % with the head. Dense is the
state dict as a safetensors file, read and copied into the model. The files are in the page cache.
"""

import copy
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.rounds import header, interleaved, options, publish, spread, table
from benchmarks.step import DTYPES, minilm
from pipeline.deltas.delta import Delta
from pipeline.files import read_file
from pipeline.masks import select
from pipeline.parameters import ParameterIndex, base_digest


def main() -> None:
    """Run the benchmark."""
    parser = options(__doc__)
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES), help="of the weights")
    chosen: Any = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    device = chosen.device
    base = minilm(DTYPES[chosen.dtype], device)
    masks = [select.random(ParameterIndex.of(base), 0.005, seed, ["classifier"]) for seed in (0, 1)]
    deltas, models = [], []
    for seed, mask in enumerate(masks):
        model = copy.deepcopy(base)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                at = mask.indices[name].to(device)
                parameter.view(-1)[at] = torch.randn(len(at), device=device).to(parameter.dtype)
        models.append(model)
        deltas.append(Delta.of(model, mask, base=base, info={"seed": seed}))
    a, b = deltas
    model = copy.deepcopy(base)

    with tempfile.TemporaryDirectory() as folder:
        dense_file, file = Path(folder) / "dense.safetensors", Path(folder) / "delta.safetensors"
        keeping_file, mask_file = Path(folder) / "keeping.safetensors", Path(folder) / "mask.safetensors"
        save_file(model.state_dict(), dense_file)
        a.save(file)
        masks[0].save(mask_file)
        Delta.of(models[0], masks[0], base=base, keep_base=True).save(keeping_file)

        def swap() -> None:
            Delta.swap_(model, a, b)

        def swap_back() -> None:
            Delta.swap_(model, b, a)

        times = interleaved(
            {
                "dense: read and load_state_dict": lambda: model.load_state_dict(load_file(dense_file)),
                "dense: load_state_dict alone": lambda: model.load_state_dict(base.state_dict()),
                "dense: save_file": lambda: save_file(model.state_dict(), dense_file),
                "Delta.save": lambda: a.save(file),
                "Delta.load": lambda: Delta.load(file),
                "of it reading and verifying bytes": lambda: read_file(file, format="fishmask-delta", version=1),
                "base digest": lambda: base_digest(base),
                "apply_": lambda: a.apply_(model),
                "swap_": swap,
                "swap_ back": swap_back,
                "revert_": lambda: a.revert_(model),
            },
            chosen.rounds,
            device,
        )
        sizes = {
            "dense checkpoint": dense_file.stat().st_size,
            "delta": file.stat().st_size,
            "delta that keeps the base's values": keeping_file.stat().st_size,
            "of it the mask": mask_file.stat().st_size,
        }
    dense = times["dense: read and load_state_dict"]
    lines = header(f"Deltas of a MiniLM-shaped BERT at 0.5 %, {chosen.dtype}", device)
    lines += table(
        ["file", "bytes", "dense is larger"],
        [[name, f"{size:,}", f"{sizes['dense checkpoint'] / size:.1f}x"] for name, size in sizes.items()],
    )
    lines += table(
        ["action", "ms", "ratio to dense read and load"],
        [[n, spread(t), f"{statistics.median(t) / statistics.median(dense):.2f}"] for n, t in times.items()],
    )
    share = statistics.median(times["base digest"]) / statistics.median(times["apply_"])
    lines += [
        f"`apply_` and `revert_` verify the whole base, which takes {share:.0%} of `apply_`; `swap_` verifies the "
        "values it replaces.",
    ]
    publish(f"deltas-{device}{'' if chosen.dtype == 'fp32' else '-' + chosen.dtype}.md", lines)


if __name__ == "__main__":
    main()
