"""One worker at one end of a link: a whole run, then several ways to train, each between two looks at the counter.

python -m link_worker FOLDER INTERFACE
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from runs import leave, train
from torch import nn

from pipeline.distributed.joint_resume import JointResume
from pipeline.distributed.launch import joined
from pipeline.distributed.local_sgd import LocalSGD
from pipeline.distributed.rounds import Course, Rounds
from pipeline.masks import select
from pipeline.masks.mask import Mask
from pipeline.parameters import ParameterIndex, base_digest
from pipeline.training.loop import Recipe, fit
from pipeline.training.masked import MaskedParameters

WAYS = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "own masks": {"own_masks": True},
    "synchronous": None,  # the gradient averaged at every step
}
MERGES = 3


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(500, 2000), nn.BatchNorm1d(2000), nn.Linear(2000, 500))


def mask_of(model: nn.Module, rank: int) -> Mask:
    return select.random(ParameterIndex.of(model), 0.5, rank, [])


def batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(4, 500, generator=draw), torch.randint(0, 500, (4,), generator=draw)


def sent(interface: str) -> int:
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


def resent() -> int:
    """Segments that TCP has sent again in this network namespace; a machine under load makes it impatient."""
    names, values = (
        line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line.startswith("Tcp:")
    )
    return int(values[names.index("RetransSegs")])


def work(way: str, rank: int) -> tuple[nn.Module, int]:
    """Train; returns the model, and the bytes that this rank counted."""
    model, options = build(), WAYS[way]
    own = options is not None and "own_masks" in options
    with MaskedParameters(model, mask_of(model, rank if own else 0)) as masked:
        if options is None:
            rounds = Rounds(masked, Course(every=0, steps_per_epoch=MERGES, steps=MERGES))
            fit(
                model, lambda _: [batch(rank, i) for i in range(MERGES)], masked=masked,
                recipe=Recipe(1, 1e-3), sync=rounds,
            )  # fmt: skip
            return model, rounds.wire.bytes_sent
        optimizer = torch.optim.SGD([masked.values], lr=0.1)
        sync = LocalSGD(masked, optimizer, every=2, debug=True, **options)
        for step in range(2 * MERGES):
            x, y = batch(rank, step)
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            masked.write_()
            optimizer.zero_grad()
            sync.step()
        return model, sync.bytes_sent


def main() -> None:
    folder, interface = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    found = {}
    with joined(60.0) as world:
        resume = JointResume(folder / f"rank-{world.rank}.safetensors", "everything", every_s=0)
        leave(folder, world, *train("everything", world, resume), dist.get_backend())
        for way in WAYS:
            dist.barrier()
            before, again = sent(interface), resent()
            model, counted = work(way, world.rank)
            dist.barrier()
            found[way] = {"counted": counted, "sent": sent(interface) - before, "digest": base_digest(model)}
            found[way]["resent"] = resent() - again
    (folder / f"link-{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
