"""The runs that real workers make and that the simulation makes again; as a script, one worker.

python cases.py RANK SIZE FOLDER        with CASES_DEVICE=cuda in the environment, on the GPU
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.masks.mask import Mask
from pipeline.parameters import ParameterIndex
from pipeline.training.masked import MaskedParameters

DEVICE = torch.device(os.environ.get("CASES_DEVICE", "cpu"))
OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "sgd": partial(torch.optim.SGD, lr=0.1),
}
OUTER = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)


@dataclass(frozen=True)
class Case:
    """One run of some local steps, a finish, and perhaps new masks on the way."""

    optimizer: str = "adamw"
    every: int = 3
    steps: int = 7
    average: str = "mean"
    outer: Callable | None = None
    wire: torch.dtype = torch.float32
    weights: torch.dtype = torch.float32
    own: bool = False
    head: tuple[str, ...] = ()
    density: float = 0.3
    renewed: int | None = None  # the merge after which masks change


CASES = {
    "mean": Case(),
    "sum, head averaged": Case(average="sum", head=("fc",), optimizer="momentum", steps=6),
    "bf16 on the wire": Case(wire=torch.bfloat16, steps=9),
    "outer optimizer": Case(outer=OUTER, optimizer="momentum", steps=9),
    "own masks": Case(own=True),
    "own masks, sum": Case(own=True, average="sum", head=("fc",), wire=torch.bfloat16, steps=9),
    "own masks, renewed": Case(own=True, renewed=2, outer=OUTER, steps=12),
    "dense": Case(density=1.0, optimizer="momentum"),
    "bf16 weights": Case(weights=torch.bfloat16, optimizer="sgd"),
    "renewed": Case(renewed=1, optimizer="momentum", wire=torch.bfloat16, steps=9),
    "one step, plain SGD": Case(every=1, steps=4, optimizer="sgd", weights=torch.float64),
}


class Net(nn.Module):
    """Convolution, BatchNorm, a buffer of its own, a linear head named fc; batch of its own form."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 3)
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += torch.stack([x.mean(), x.std()])
        return self.fc(F.relu(self.norm(self.conv(x))).mean(dim=(2, 3)))


def build(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return Net().to(DEVICE, dtype).train()


def batch(rank: int, step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Ranks see different data, of different spread."""
    draw = torch.Generator().manual_seed(1000 * rank + step)
    x = torch.randn(6, 1, 4, 4, generator=draw) * (1 + rank) + rank
    return x.to(DEVICE, dtype), torch.randint(0, 3, (6,), generator=draw).to(DEVICE)


def mask_of(case: Case, rank: int, round_: int = 0) -> Mask:
    """The head and some coordinates: the same for all ranks, or partly one's own."""
    index = ParameterIndex.of(build(case.weights))
    draw = torch.Generator().manual_seed(10 * round_ + (rank + 1 if case.own else 0))
    flags = {name: torch.rand(shape, generator=draw) < case.density for name, shape in index.shapes.items()}
    for name in index.within(["fc"]):
        flags[name][:] = True
    return Mask.from_bool(flags)


def local_step(case: Case, model: nn.Module, masked: MaskedParameters, optimizer, rank: int, step: int) -> None:
    x, y = batch(rank, step, case.weights)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    masked.write_()
    optimizer.zero_grad()


def snapshot(model: nn.Module, masked: MaskedParameters) -> dict[str, Tensor]:
    state = model.state_dict() | {"theta": masked.values}
    return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}


def work(case: Case, rank: int) -> dict[str, Tensor]:
    """What one worker ends with."""
    from pipeline.distributed.local_sgd import LocalSGD

    model = build(case.weights)
    masked = MaskedParameters(model, mask_of(case, rank))
    optimizer = OPTIMIZERS[case.optimizer]([masked.values])
    sync = LocalSGD(
        masked, optimizer, every=case.every, average=case.average, outer=case.outer, dtype=case.wire,
        own_masks=case.own, head=case.head, debug=True,
    )  # fmt: skip
    merged = []
    for step in range(case.steps):
        local_step(case, model, masked, optimizer, rank, step)
        merged.append(sync.step())
        if sync.merges == case.renewed and merged[-1]:
            sync.remask_(mask_of(case, rank, 1))
    merged.append(sync.finish())
    assert merged == [(s + 1) % case.every == 0 for s in range(case.steps)] + [case.steps % case.every > 0]
    numbers = {"bytes": sync.bytes_sent, "k": sync.union.nnz, "merges": sync.merges}
    numbers |= {f"bytes {purpose}": count for purpose, count in sync.bytes.items()}
    return snapshot(model, masked) | {name: torch.tensor(n) for name, n in numbers.items()} | {
        "drift": torch.tensor(sync.drift, dtype=torch.float64)
    }  # fmt: skip


def main() -> None:
    import torch.distributed as dist
    from safetensors.torch import save_file

    from pipeline.distributed import collectives
    from pipeline.errors import MismatchError

    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(DEVICE.type == "cuda")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    handed = count_bytes(collectives.dist)
    for name, case in CASES.items():
        before = sum(handed)
        result = work(case, rank)
        save_file(result | {"handed": torch.tensor(sum(handed) - before)}, folder / f"{name}-{rank}.safetensors")
    refused = []
    for case, there in ((Case(), rank), (Case(own=True), 0)):  # another model; another mask
        model = build(case.weights)
        if there and not case.own:
            model.fc.bias.data += 1
        masked = MaskedParameters(model, mask_of(case, rank))
        try:
            from pipeline.distributed.local_sgd import LocalSGD

            LocalSGD(masked, OPTIMIZERS["sgd"]([masked.values]), every=1)
        except MismatchError as error:
            refused.append(str(error))
    (folder / f"refused-{rank}").write_text("\n".join(refused))
    dist.destroy_process_group()


def count_bytes(dist) -> list[int]:
    """Watch what is really handed to torch.distributed for other ranks, per call."""
    handed: list[int] = []
    original = dist.batch_isend_irecv

    def watched(steps):
        handed.append(sum(s.tensor.numel() * s.tensor.element_size() for s in steps if s.op is dist.isend))
        return original(steps)

    dist.batch_isend_irecv = watched
    return handed


if __name__ == "__main__":
    main()
