"""What a step asks of an accelerator, seen without one: no value, and few kernels.

On the device ``meta`` tensors have shapes and no values: what would make the host wait for a GPU (``.item()``, a
tensor as a condition, ``nonzero``, an index of booleans, a copy to the CPU) cannot be answered there and raises.
Everything that is not a CPU goes the way of a GPU in the loop, losses included.
"""

import contextlib
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.errors import Interrupted
from pipeline.losses import example_losses, to_device
from pipeline.masks.select import dense, random
from pipeline.parameters import ParameterIndex
from pipeline.tasks import cifar
from pipeline.tasks.batches import Batches
from pipeline.tasks.evaluation import evaluate
from pipeline.tasks.image import ImageSplit
from pipeline.tasks.resnet import BUILTIN
from pipeline.training import bunches
from pipeline.training.leak import LeakyParameters
from pipeline.training.loop import fit
from pipeline.training.masked import MaskedParameters
from pipeline.training.recipe import Recipe
from tests.training.test_masked import CASES, random_mask

META = torch.device("meta")
STEPS = 6


def on_meta(make, *arguments):
    with META:
        return make(*arguments)


def run(model, mask, batches, recipe, kind=MaskedParameters, **rest):
    """Train some steps, and leave before the end of the epoch, where values are read."""
    done = iter(range(1, 1 + 2 * STEPS))
    with kind(model, mask) as masked, pytest.raises(Interrupted):
        fit(
            model, lambda epoch: batches, masked=masked, recipe=recipe, channels_last=True,
            progress=lambda p: None, should_stop=lambda: next(done) == STEPS, **rest,
        )  # fmt: skip


@pytest.mark.parametrize("kind", [MaskedParameters, LeakyParameters])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("case", CASES)
def test_no_step_needs_a_value_from_the_device(case, optimizer, kind):
    make, batch = CASES[case]
    model = on_meta(make)
    recipe = Recipe(1, 1e-2, optimizer, weight_decay=0.1, clip=1.0, accumulate=2, warmup=0.3)
    batches = [to_device(batch(i), META) for i in range(4 * STEPS)]
    run(model, random_mask(model, 0.3, whole=("classifier" if case == "bert" else "fc",)), batches, recipe, kind)


def waits(model, batch):
    losses = example_losses(model, batch)
    return losses * float(losses.sum() > 0)


def test_a_step_that_needs_one_is_noticed():
    make, batch = CASES["resnet"]
    model = on_meta(make)
    batches = [to_device(batch(i), META) for i in range(4 * STEPS)]
    with MaskedParameters(model, random_mask(model)) as masked, pytest.raises(RuntimeError, match="meta"):
        fit(model, lambda epoch: batches, masked=masked, recipe=Recipe(1, 1e-2), loss=waits)


@pytest.mark.parametrize("name", ["resnet-digits", "resnet9", "vit"])
def test_images_are_sent_augmented_and_trained_on_without_a_wait(name):
    model = on_meta(BUILTIN[name], 3, 10)
    pixels = np.zeros((8 * STEPS, 3, 16, 16), dtype=np.uint8)
    split = ImageSplit(pixels, torch.zeros(len(pixels), dtype=torch.int64), [0.5] * 3, [0.2] * 3)
    groups = np.arange(len(pixels)).reshape(-1, 4)
    batches = Batches(groups, lambda n, rows: split.batch(rows, META, lambda x: cifar.augment(x, seed=n)))
    mask = random(ParameterIndex.of(model), 0.1, 0, ["fc"])
    run(model, mask, batches, Recipe(1, 0.1, "sgd", weight_decay=5e-4, schedule="piecewise", warmup=0.1))


def test_evaluation_reads_its_outputs_once_at_the_end(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no such device
    model, asked = on_meta(BUILTIN["resnet-digits"], 1, 10), []

    def batches():
        for number in range(5):
            asked.append(number)
            yield torch.empty(4, 1, 8, 8, device=META), torch.zeros(4, dtype=torch.int64, device=META)

    with pytest.raises(NotImplementedError, match="meta"):
        evaluate(model, batches(), "accuracy", META)
    assert asked == [0, 1, 2, 3, 4]


class Kernels(TorchDispatchMode):
    """Counts operators, views not among them: each is a kernel on a GPU, or several for lists of tensors."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not (function.is_view or function.overloadpacket.__name__ in ("detach", "_reshape_alias")):
            self.count[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def kernels_of_a_step(mask_of):
    model = on_meta(BUILTIN["resnet18"], 3, 10)
    x, y = torch.empty(4, 3, 16, 16, device=META), torch.zeros(4, dtype=torch.int64, device=META)
    if mask_of is None:
        with Kernels() as plain:
            F.cross_entropy(model(x), y).backward()
        return sum(plain.count.values()), len(list(model.parameters()))
    counts, done = Kernels(), iter(range(1, 4))

    def stop():
        if (step := next(done)) == 1:
            counts.count.clear()  # of the first step, which allocates
        return step == 2

    mask = mask_of(ParameterIndex.of(model))
    with MaskedParameters(model, mask) as masked, counts, pytest.raises(Interrupted):
        fit(model, lambda e: [(x, y)] * 9, masked=masked, recipe=Recipe(1, 0.1, "sgd"), should_stop=stop)
    return sum(counts.count.values()), sum(mask.count(name) > 0 for name in mask.index)


def test_on_a_gpu_small_tensors_are_gathered_and_written_together(monkeypatch):
    monkeypatch.setattr(bunches, "DEVICES", {"meta"})
    plain, _ = kernels_of_a_step(None)
    sparse, tensors = kernels_of_a_step(lambda index: random(index, 0.1, 0, ["fc"]))
    large = sum(p.numel() > bunches.SMALL for p in on_meta(BUILTIN["resnet18"], 3, 10).parameters())
    assert tensors == 62 and large == 4
    assert sparse <= plain + 2 * large + 30
    whole, _ = kernels_of_a_step(dense)
    assert whole <= plain + large + 20


@pytest.mark.parametrize("density", [0.001, 0.1])
def test_masking_costs_few_kernels_beside_a_plain_forward_and_backward(density):
    plain, _ = kernels_of_a_step(None)
    sparse, tensors = kernels_of_a_step(lambda index: random(index, density, 0, ["fc"]))
    assert sparse <= plain + 2 * tensors + 20  # one to gather and one to write each; the optimizer's own are few
    whole, tensors = kernels_of_a_step(dense)
    assert whole <= plain + tensors + 20
