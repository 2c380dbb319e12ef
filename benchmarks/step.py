"""One training step: masked against dense AdamW, the official way (gradient x mask, then AdamW), LoRA and BitFit.

    python -m benchmarks.step --device cpu --threads 1         # three minutes; writes results/step-cpu.md
    python -m benchmarks.step --device cuda --dtype bf16       # results/step-cuda-bf16.md
    python -m benchmarks.step --device cuda --model bert-large

The model is a BERT built from its config, with random weights: MiniLM's shape, or BERT-large. Memory
is counted in bytes, beyond weights and activations: optimizer state, trained vector and coordinates, dense masks,
adapters, and the most gradient bytes alive at once, seen by hooks while a step runs.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import DTYPES, MODELS
from benchmarks.rounds import header, interleaved, options, publish, ratios, spread, synchronize, table
from pipeline.masks.mask import Mask
from pipeline.parameters import ParameterIndex
from pipeline.training.masked import MaskedParameters

SHAPES = {"8 x 128": (8, 128), "32 x 8": (32, 8)}
RANK = 8


def minilm(dtype: torch.dtype, device: str, name: str = "minilm") -> nn.Module:
    """A BERT in MiniLM-L6's shape, or another of the list; the same at every call."""
    torch.manual_seed(0)
    return MODELS[name]()[0].to(device, dtype).train()


class LoRA(nn.Module):
    """A linear layer plus B A of rank 8, as peft does it without dropout."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.a = nn.Parameter(torch.randn(RANK, linear.in_features, **like) / RANK)
        self.b = nn.Parameter(torch.zeros(linear.out_features, RANK, **like))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer and its update."""
        return self.linear(x) + 2.0 * (x @ self.a.T) @ self.b.T


def with_lora(model: nn.Module, chosen: Callable[[str], bool]) -> nn.Module:
    """Freeze a model and adapt the linear layers whose last name is chosen, head trained whole."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "classifier" and chosen(name.rpartition(".")[2]):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], LoRA(module))
    model.get_submodule("classifier").requires_grad_(True)
    return model


@dataclass
class Contestant:
    """A model with its way of updating.

    Attributes:
        model: run forward and backward.
        optimizer: what ``update`` steps.
        update: from gradients in place to new weights.
        extra: tensors kept for the method alone.
        backward_ms, update_ms: times of the steps since ``clear``.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    update: Callable[[], None]
    extra: list[Tensor] = field(default_factory=list)
    backward_ms: list[float] = field(default_factory=list)
    update_ms: list[float] = field(default_factory=list)

    def step(self, batch: dict[str, Tensor], device: str) -> None:
        """Run one training step."""
        start = time.perf_counter()
        self.model(**batch).loss.backward()
        synchronize(device)
        middle = time.perf_counter()
        self.update()
        self.optimizer.zero_grad()
        synchronize(device)
        self.backward_ms.append(1e3 * (middle - start))
        self.update_ms.append(1e3 * (time.perf_counter() - middle))


def contestants(name: str, dtype: torch.dtype, device: str) -> dict[str, Contestant]:
    """Build every contestant on a model of its own."""
    base = minilm(dtype, device, name)
    index = ParameterIndex.of(base)
    random = Mask.top_k({n: torch.rand(s) for n, s in index.shapes.items()}, 0.005, always=["classifier"])
    scores = {n: torch.rand(s) for n, s in index.shapes.items()}
    scores["bert.pooler.dense.weight"] *= 2.8  # as in a real Fisher mask of MiniLM: most coordinates in the pooler
    for score in scores.values():
        score *= 1 + torch.rand(len(score), *[1] * (score.ndim - 1))  # and the rest clustered in rows
    clustered = Mask.top_k(scores, 0.005, always=["classifier"])
    result: dict[str, Contestant] = {}

    def plain(name: str, model: nn.Module, extra: list[Tensor] | None = None) -> Contestant:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        result[name] = Contestant(model, optimizer, optimizer.step, extra or [])
        return result[name]

    plain("dense AdamW (fused)", copy.deepcopy(base))
    flags = {n: f.to(device, dtype) for n, f in random.to_bool().items()}
    official = plain("official: gradient x mask, AdamW (fused)", copy.deepcopy(base), list(flags.values()))

    def multiply_and_step() -> None:
        for name, parameter in official.model.named_parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(flags[name])
        official.optimizer.step()

    official.update = multiply_and_step
    for name, mask in (
        ("masked, random 0.5 %", random),
        ("masked, clustered 0.5 %", clustered),
        ("masked, everything", Mask.covering(index, list(index))),
    ):
        model = copy.deepcopy(base)
        masked = MaskedParameters(model, mask)
        optimizer = torch.optim.AdamW([masked.values], lr=1e-4, fused=True)

        def step(masked: MaskedParameters = masked, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            masked.write_()

        held = [
            masked.values.detach(),
            *(s.coordinates for s in masked.segments.values() if s.coordinates is not None),
        ]
        result[name] = Contestant(model, optimizer, step, held)
    for name, layers in (("LoRA r=8 on q, v", {"query", "value"}), ("LoRA r=8 on all linears", None)):
        adapted = with_lora(copy.deepcopy(base), lambda n, layers=layers: layers is None or n in layers)
        own = [p.detach() for m in adapted.modules() if isinstance(m, LoRA) for p in (m.a, m.b)]
        plain(name, adapted, own)
    model = copy.deepcopy(base)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".bias") or name.startswith("classifier."))
    plain("BitFit (biases and head)", model)
    return result


def size(tensor: Tensor) -> int:
    """Bytes of a tensor; a sparse one counts its values and indices."""
    parts = (tensor._values(), tensor._indices()) if tensor.is_sparse else (tensor,)
    return sum(p.numel() * p.element_size() for p in parts)


def training_bytes(contestant: Contestant, batch: dict[str, Tensor], device: str) -> int:
    """Measure the bytes that training takes beyond weights and activations, over one step."""
    leaves = [p for p in contestant.model.parameters() if p.requires_grad]
    vector = contestant.optimizer.param_groups[0]["params"]
    holders = list({id(p): p for p in [*leaves, *vector]}.values())
    most = 0

    def look(grad: Tensor) -> None:
        nonlocal most
        arriving = size(grad) * (2 if grad.is_sparse else 1)  # a sparse one is sorted into a second copy
        most = max(most, arriving + sum(size(p.grad) for p in holders if p.grad is not None))

    handles = [p.register_hook(look) for p in leaves]
    contestant.step(batch, device)
    for handle in handles:
        handle.remove()
    state = sum(size(t) for s in contestant.optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
    return most + state + sum(map(size, contestant.extra))


def cuda_peak(contestant: Contestant, batch: dict[str, Tensor], device: str) -> float:
    """Measure the most MiB allocated during a step, beyond what was allocated before it."""
    contestant.step(batch, device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    contestant.step(batch, device)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> None:
    """Run the benchmark."""
    parser = options(__doc__)
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES), help="of the weights")
    parser.add_argument("--model", default="minilm", choices=["minilm", "bert-large"])
    chosen: Any = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    device = chosen.device
    lines = header(f"One training step, {chosen.model}, {chosen.dtype}", device)
    everyone = contestants(chosen.model, DTYPES[chosen.dtype], device)
    draw = torch.Generator().manual_seed(0)
    for name, (examples, length) in SHAPES.items():
        batch = {
            "input_ids": torch.randint(0, 30522, (examples, length), generator=draw).to(device),
            "attention_mask": torch.ones(examples, length, dtype=torch.int64, device=device),
            "labels": torch.randint(0, 2, (examples,), generator=draw).to(device),
        }
        held = {n: training_bytes(c, batch, device) for n, c in everyone.items()}
        peaks = {n: cuda_peak(c, batch, device) for n, c in everyone.items()} if device == "cuda" else {}
        for contestant in everyone.values():
            contestant.backward_ms.clear()
            contestant.update_ms.clear()
        whole = interleaved(
            {n: lambda c=c, batch=batch: c.step(batch, device) for n, c in everyone.items()}, chosen.rounds, device
        )
        reference, dense = whole["dense AdamW (fused)"], held["dense AdamW (fused)"]
        official = everyone["official: gradient x mask, AdamW (fused)"].update_ms[1:]
        rows = [
            [
                n,
                spread(whole[n]),
                ratios(whole[n], reference),
                spread(c.update_ms[1:]),
                f"{statistics.median(official) / statistics.median(c.update_ms[1:]):.1f}x",
                f"{held[n] / 2**20:.2f}",
                f"{held[n] / dense:.1%}",
                *([f"{peaks[n]:.0f}"] if peaks else []),
            ]
            for n, c in everyone.items()
        ]
        columns = ["method", "whole step, ms", "ratio to dense", "update alone, ms", "faster than official",
                   "training memory, MiB", "of dense", *(["CUDA peak, MiB"] if peaks else [])]  # fmt: skip
        lines += [f"## {name} tokens", "", *table(columns, rows)]
    lines += [
        "Update: from gradients to new weights (optimizer, writing back, zeroing). Training memory: optimizer "
        "state, trained vector, coordinates, dense masks, adapters, and the most gradient bytes alive at once.",
    ]
    parts = ["step", device, chosen.dtype.removeprefix("fp32"), chosen.model.removeprefix("minilm")]
    publish("-".join(filter(None, parts)) + ".md", lines)


if __name__ == "__main__":
    main()
