"""Deltas and chains: bytes of values in each dtype; time to apply, swap, revert, restore against a dense load.

    python -m benchmarks.deltas --threads 1         # a minute; writes results/deltas-cpu.md
    python -m benchmarks.deltas --threads 1 --delta artifacts/train/words-fish-main/seed-0/delta.safetensors

A MiniLM-shaped BERT (22.7 M parameters, random weights), and two random masks of 0.5 % with the head, each trained
by 20 steps of AdamW; the chain has eight steps of the two in turn. Dense is the state dict as a safetensors file,
read and copied into the model. The files are in the page cache. With ``--delta`` the coding of values is measured
on the given files as well. LoRA's hot swap (rank 8 on query and value, no head) is PEFT's, from files and from
memory; left out where peft is not installed.
"""

import copy
import tempfile
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.rounds import header, interleaved, options, publish, ratios, share, spread, table
from benchmarks.step import DTYPES, minilm
from pipeline.deltas import thin
from pipeline.deltas import values as coding
from pipeline.deltas.chain import Chain
from pipeline.deltas.delta import Delta
from pipeline.deltas.variants import Variants
from pipeline.masks import select
from pipeline.masks.mask import Mask
from pipeline.parameters import ParameterIndex, base_digest
from pipeline.tasks.saved import load_model
from pipeline.training.masked import MaskedParameters

STEPS = 8  # of the chain
NEWEST = "Chain: restore_ the newest step"
CHECKED = ("Delta.load: checksums and digests", "Delta.load, thin: checksums and digests")
CODED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def trained(base: nn.Module, mask: Mask, seed: int, device: str) -> nn.Module:
    """Train the mask's coordinates for a few steps on random tokens with random labels."""
    model = copy.deepcopy(base).eval()
    draw = torch.Generator().manual_seed(seed)
    with MaskedParameters(model, mask) as masked:
        optimizer = torch.optim.AdamW([masked.values], lr=1e-3)
        for _ in range(20):
            tokens = torch.randint(1000, 30000, (8, 16), generator=draw).to(device)
            labels = torch.randint(2, (8,), generator=draw).to(device)
            model(input_ids=tokens, labels=labels).loss.backward()
            optimizer.step()
            masked.write_()
            optimizer.zero_grad()
    return model


def coded(name: str, delta: Delta, base: nn.Module, rounds: int) -> list[list[str]]:
    """Code the values at the tensors covered in part: one row a dtype.

    The weights are cast to the dtype, and the change added to them in float64.
    """
    parameters = dict(base.named_parameters())
    names = [n for n in delta.mask.index if delta.mask.count(n) and not delta.mask.whole(n)]
    places = thin.places(delta.mask, names)
    start = {n: parameters[n].detach().cpu().reshape(-1)[delta.mask.indices[n]] for n in names}
    before, after = thin.joined(start, names), thin.joined(delta.values, names)
    rows = []
    for title, dtype in CODED.items():
        low, high = before, after
        if dtype != after.dtype:  # scaled, so that fp64 has digits of its own
            low = (before.double() * 1.0001).to(dtype)
            high = (low.double() + (after.double() - before.double()) * 1.0001).to(dtype)
        alone, against = coding.encode(high), coding.encode_against(high, low, places)
        times = interleaved(
            {
                "encode alone": lambda high=high: coding.encode(high),
                "encode against": lambda high=high, low=low: coding.encode_against(high, low, places),
                "decode alone": lambda c=alone, d=dtype: coding.decode(c[1], c[0], d, len(before)),
                "decode against": lambda c=against, low=low: coding.decode_against(c[1], c[0], low, places),
            },
            rounds,
            "cpu",
        )
        shares = [f"{part.nbytes / high.nbytes:.3f}" for _, part in (alone, against)]
        rows.append([name, title, f"{high.nbytes:,}", *shares, *(spread(own) for own in times.values())])
    return rows


def chained(base: nn.Module, masks: list[Mask], folder: Path) -> Chain:
    """Make a chain of steps of about the size that training makes."""
    chain, model = Chain.create(folder, base), copy.deepcopy(base)
    torch.manual_seed(0)
    for step in range(STEPS):
        mask = masks[step % len(masks)]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                at = mask.indices[name].to(parameter.device)
                parameter.view(-1)[at] += (1e-3 * torch.randn(len(at))).to(parameter)
        chain.append(model, mask)
    return chain


def lora(base: nn.Module, folder: Path, device: str) -> dict[str, Callable[[], object]]:
    """Hot swaps of PEFT: an adapter's file read and put in, and put in from memory."""
    try:
        from peft import LoraConfig, get_peft_model
        from peft.utils.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict
    except ImportError:
        return {}
    config = LoraConfig(r=8, target_modules=["query", "value"])
    for number in range(2):
        torch.manual_seed(number)
        model = get_peft_model(copy.deepcopy(base), config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter.data, std=0.01)
        model.save_pretrained(folder / f"lora-{number}")
    files = [folder / f"lora-{number}" / "adapter_model.safetensors" for number in range(2)]
    held = [{n.replace(".weight", ".default.weight"): t for n, t in load_file(f, device).items()} for f in files]
    turn = [0, 0]

    def from_file() -> None:
        turn[0] ^= 1
        hotswap_adapter(model, str(folder / f"lora-{turn[0]}"), adapter_name="default", torch_device=device)

    def from_memory() -> None:
        turn[1] ^= 1
        hotswap_adapter_from_state_dict(model, held[turn[1]], "default", config)

    return {"PEFT: hotswap_adapter, from the file": from_file, "PEFT: the same, from memory": from_memory}


def main() -> None:
    """Run the benchmark."""
    parser = options(__doc__)
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES), help="of the weights")
    parser.add_argument("--delta", action="append", default=[], help="a file to code the values of; repeatable")
    chosen: Any = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    device = chosen.device
    base = minilm(DTYPES[chosen.dtype], device)
    masks = [select.random(ParameterIndex.of(base), 0.005, seed, ["classifier"]) for seed in (0, 1)]
    models = [trained(base, mask, seed, device) for seed, mask in enumerate(masks)]
    a, b = (Delta.of(model, mask, base=base) for model, mask in zip(models, masks, strict=True))
    lines = header(f"Deltas of a MiniLM-shaped BERT at 0.5 %, {chosen.dtype}", device)

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        dense, alone, slim = (folder / f"{name}.safetensors" for name in ("dense", "alone", "thin"))
        second, kept, only = (folder / f"{name}.safetensors" for name in ("second", "kept", "mask"))
        save_file(base.state_dict(), dense)
        sizes = {
            "dense checkpoint": dense.stat().st_size,
            "delta": a.save(alone),
            "delta, thin": a.save(slim, base=base),
            "delta that keeps the base's values": a.with_base(base).save(kept),
            "of each the mask": masks[0].save(only),
        }
        chain = chained(base, masks, folder / "chain")
        sizes[f"chain of {STEPS} steps, without its base"] = sum(sum(step.nbytes.values()) for step in chain.steps)
        b.save(second, base=base)
        lines += table(
            ["file", "bytes", "dense is larger"],
            [
                [name, f"{size:,}", f"{sizes['dense checkpoint'] * (STEPS if 'chain' in name else 1) / size:.1f}x"]
                for name, size in sizes.items()
            ],
        )
        rows = coded("random mask, 20 steps", a, base, chosen.rounds) if chosen.dtype == "fp32" else []
        for file in chosen.delta:
            delta = Delta.load(file)
            source = load_model(delta.info["model"], info=delta.info)
            rows += coded(file, delta.resolve(source), source, chosen.rounds)
        columns = ["values of", "dtype", "raw bytes", "alone / raw", "against the base / raw"]
        if rows:
            lines += table([*columns, "encode alone ms", "against ms", "decode alone ms", "against ms"], rows)

        plain, swapped, own = (copy.deepcopy(base) for _ in range(3))
        before = base.state_dict()
        variants = Variants(own, {"a": Delta.load(slim), "b": Delta.load(second)})
        a.apply_(swapped)
        pair = [b, a]

        def swap() -> None:
            pair.reverse()
            Delta.swap_(swapped, *pair)

        filed = copy.deepcopy(base)
        at_hand = [Delta.load(second)]
        at_hand[0].apply_(filed)

        def swap_from_file() -> None:
            fresh = Delta.load(slim if at_hand[0] == b else second)
            Delta.swap_(filed, at_hand[0], fresh)
            at_hand[0] = fresh

        restored, bytes_of = copy.deepcopy(base), {file: file.read_bytes() for file in (alone, slim)}

        def verify(file: Path) -> None:
            """Hash what loading a file hashes: its bytes, its mask, and, of values that need no base, all."""
            blake2b(bytes_of[file], digest_size=32)
            Mask.digest.func(a.mask)  # cached otherwise
            if file == alone:
                thin.content_digest(a.mask, a.base, a.values, a.buffers)

        def dense_and_verify() -> None:
            state = load_file(dense, device)
            base_digest(state)
            restored.load_state_dict(state)

        times = interleaved(
            {
                "dense: read and load_state_dict": lambda: plain.load_state_dict(load_file(dense, device)),
                "dense: load_state_dict alone": lambda: plain.load_state_dict(before),
                "dense: save_file": lambda: save_file(before, dense),
                "Delta.save": lambda: a.save(alone),
                "Delta.save, thin, base verified": lambda: a.save(slim, base=base),
                "Delta.load": lambda: Delta.load(alone),
                "Delta.load, thin": lambda: Delta.load(slim),
                CHECKED[0]: lambda: verify(alone),
                CHECKED[1]: lambda: verify(slim),
                "dense: read, digest, load_state_dict": dense_and_verify,
                "Chain.open": lambda: Chain.open(folder / "chain"),
                NEWEST: lambda: chain.restore_(restored),
                "Chain: restore_ the first step": lambda: chain.restore_(restored, 1),
                "base digest": lambda: base_digest(base),
                "apply_": lambda: a.apply_(plain),
                "revert_": lambda: a.revert_(plain),
                "swap_": swap,
                "Delta.load of a thin file and swap_": swap_from_file,
                "Variants: a to b": lambda: variants.use("b"),
                "Variants: b to the base": lambda: variants.use(None),
                "Variants: the base to a": lambda: variants.use("a"),
                **lora(base, folder, device),
            },
            chosen.rounds,
            device,
        )
    reload = times["dense: read and load_state_dict"]
    lines += table(
        ["action", "ms", "ratio to dense read and load"],
        [[name, spread(own), ratios(own, reload)] for name, own in times.items()],
    )
    parts = {
        "Delta.load": CHECKED[0], "Delta.load, thin": CHECKED[1], "apply_": "base digest", NEWEST: "base digest"
    }  # fmt: skip
    lines += table(
        ["action", "of it checksums and digests"],
        [[name, share([times[part]], times[name])] for name, part in parts.items()],
    )
    lines += ["`apply_` and `revert_` verify the whole base, `restore_` the whole state; `swap_` verifies the "
              "values it replaces."]  # fmt: skip
    publish(f"deltas-{device}{'' if chosen.dtype == 'fp32' else '-' + chosen.dtype}.md", lines)


if __name__ == "__main__":
    main()
