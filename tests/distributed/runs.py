"""A distributed run of `fit`, as torchrun starts it; ends with files that say what this rank holds.

python -m runs FOLDER COURSE [FAULT RANK STEP]        FAULT: kill, stop, hang, pause, diverge; once in a folder
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from cases import DEVICE, Net, batch
from safetensors.torch import save_file

from pipeline.distributed.collectives import Collectives
from pipeline.distributed.joint_resume import JointResume
from pipeline.distributed.launch import is_worker, joined, launch
from pipeline.distributed.own_masks import interleaved, random_scores
from pipeline.distributed.rounds import Course, Rounds
from pipeline.errors import DataError, DivergedError, FishmaskError
from pipeline.masks import select
from pipeline.masks.mask import Mask
from pipeline.parameters import ParameterIndex
from pipeline.training.loop import Recipe, fit
from pipeline.training.masked import MaskedParameters

EPOCHS, LENGTH, TIMEOUT = 4, 6, 20.0
COURSES = {
    "plain": {"every": 4},
    "ddp": {"every": 0},
    "everything": {"every": 4, "dense_steps": 6, "renew": 2, "own_masks": True, "outer": (0.7, 0.9)},
    "bf16": {"every": 5, "dense_steps": 6, "dtype": torch.bfloat16, "average": "sum"},
    "synchronous": {"every": 0, "dense_steps": 6, "renew": 4},
}


def choose(course: dict, world: Collectives, number: int) -> Mask:
    index = ParameterIndex.of(Net())
    if course.get("own_masks") and world.size > 1:
        return interleaved(random_scores(index, number), 0.45, world.size, world.rank, ["fc"])
    return select.random(index, 0.5, number, ["fc"])


def train(
    name: str, world: Collectives, resume: JointResume | None = None, fault=lambda step, model: None, sync=True
):
    """One rank's run.

    Returns:
        The model, the rounds (None without sync), and the result of `fit`.
    """
    torch.manual_seed(0)
    model, course = Net().to(DEVICE), COURSES[name]
    first = select.dense(ParameterIndex.of(model)) if course.get("dense_steps") else choose(course, world, 0)
    with MaskedParameters(model, first) as masked:
        rounds = Rounds(
            masked,
            Course(steps_per_epoch=LENGTH, steps=EPOCHS * LENGTH, debug=True, **course),
            head=("fc",),
            choose=lambda model, number: choose(course, world, number),
            evaluate=lambda model: {"weight": float(model.fc.weight.sum()), "draw": float(torch.rand(()))},
        )
        if resume is not None:
            resume.wire = rounds.wire

        def batches(epoch):
            fault(rounds._step, model)
            return [batch(world.rank, 100 * epoch + i, torch.float32) for i in range(LENGTH)]

        recipe = Recipe(EPOCHS, 0.01, seed=world.rank, weight_decay=0.1)
        try:
            result = fit(
                model, batches, masked=masked, recipe=recipe, resume=resume, sync=rounds if sync else None,
                progress=lambda p: fault(p.step, model),
            )  # fmt: skip
        except DivergedError:
            rounds.give_up()
            raise
    return model, rounds, result


def leave(folder: Path, world: Collectives, model: torch.nn.Module, rounds: Rounds, result, backend: str) -> None:
    """Write down what this rank ends with."""
    rank = world.rank
    save_file(dict(model.state_dict()), folder / f"end-{rank}.safetensors")
    outcome = {"records": rounds.records, "bytes": rounds.bytes, "resumed": result.resumed_from}
    outcome |= {"touched": rounds.touched.digest, "world": world.size, "backend": backend}
    (folder / f"end-{rank}.json").write_text(json.dumps(outcome))


def main() -> None:
    folder, name, *fault = Path(sys.argv[1]), *sys.argv[2:]
    rank = int(os.environ["RANK"])
    marker = folder / "fault"

    def strike(step: int, model: torch.nn.Module) -> None:
        if fault[:1] == ["complain"] and step == int(fault[2]):
            raise DataError("data.csv: row 3 has no label; give it one")
        if not fault or (rank, step) != (int(fault[1]), int(fault[2])) or marker.exists():
            return
        marker.touch()
        if fault[0] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault[0] == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if fault[0] == "hang":
            time.sleep(600)
        if fault[0] == "pause":
            time.sleep(3)
        if fault[0] == "diverge":
            model.fc.weight.data.fill_(float("nan"))

    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(DEVICE.type == "cuda")
    with joined(TIMEOUT, cuda=DEVICE.type == "cuda", grace=2.0) as world:
        backend = dist.get_backend()
        resume = JointResume(folder / f"rank-{rank}.safetensors", name, every_s=0)
        try:
            model, rounds, result = train(name, world, resume, strike)
        except DivergedError as error:
            (folder / f"diverged-{rank}").write_text(str(error))
            return
    leave(folder, world, model, rounds, result, backend)


if __name__ == "__main__":
    try:
        if is_worker():
            main()
        else:
            launch(int(sys.argv.pop(1)), restarts=int(sys.argv.pop(1)))
    except FishmaskError as error:
        print(f"runs: {error}", file=sys.stderr)
        raise SystemExit(error.code) from None
