"""Training on a GPU: the CPU's θ, frozen values that stay, little memory, and no wait for the device."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from pipeline.errors import ModelError
from pipeline.losses import example_losses
from pipeline.training.leak import LeakyParameters
from pipeline.training.loop import Recipe, fit
from pipeline.training.masked import MaskedParameters
from tests.training.test_masked import CASES, assert_frozen, random_mask, state_of

pytestmark = pytest.mark.usefixtures("repeatable")

RECIPES = {
    "adamw": Recipe(2, 1e-2, weight_decay=0.1, clip=0.5, warmup=0.2, accumulate=2),
    "adam": Recipe(2, 1e-2, "adam", weight_decay=0.1),
    "sgd": Recipe(2, 0.05, "sgd", weight_decay=0.05, clip=0.5, accumulate=3),
}


def floats_to(batch, dtype):
    return batch if isinstance(batch, dict) else (batch[0].to(dtype), batch[1])


def trained(case, place, recipe, dtype=torch.float64, kind=MaskedParameters, renew=False, **rest):
    """Fit one of the models.

    Returns:
        The model, its state before, the mask, what θ was and is, and the result.
    """
    torch.manual_seed(1)
    make, batch = CASES[case]
    model = make().to(place, dtype)
    before = state_of(model)
    mask, other = random_mask(model, 0.3), random_mask(model, 0.3, seed=2)
    with kind(model, mask) as masked:
        start = masked.values.detach().clone()
        result = fit(
            model, lambda epoch: [floats_to(batch(10 * epoch + i), dtype) for i in range(5)], masked=masked,
            recipe=recipe, evaluate=lambda m: {"weight": float(next(m.parameters()).double().sum())},
            after_epoch=(lambda entry, m, now: other) if renew else None, **rest,
        )  # fmt: skip
        return model, before, mask | other if renew else mask, start, masked.values.detach().clone(), result


@pytest.mark.parametrize("way", ["plain", "renewed", "leaky", "leaky, renewed", "channels last"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("case", CASES)
def test_fit_gives_the_cpus_theta_in_float64(case, recipe, way, cuda):
    options = {"kind": LeakyParameters if "leaky" in way else MaskedParameters, "renew": "renewed" in way}
    last = {"channels_last": True} if way == "channels last" else {}
    model, before, mask, start, theta, result = trained(case, cuda, RECIPES[recipe], **options, **last)
    twin, *_, expected, on_cpu = trained(case, torch.device("cpu"), RECIPES[recipe], **options)
    assert theta.device.type == "cuda" and result.device == "cuda:0"
    torch.testing.assert_close(theta.cpu(), expected, rtol=1e-7, atol=1e-9)
    for (name, one), other in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-7, atol=1e-9, msg=name)
    assert [e["train_loss"] for e in result.history] == pytest.approx([e["train_loss"] for e in on_cpu.history])
    if "leaky" not in way:
        assert_frozen(model, before, mask)
    if way == "plain":
        assert (theta != start).double().mean() > 0.8  # all but embeddings of absent tokens, and biases at zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_frozen_is_frozen_under_autocast_and_in_half_precision(case, dtype, cuda):
    recipe = RECIPES["adamw"]
    model, before, mask, start, theta, result = trained(
        case, cuda, recipe, dtype, autocast=torch.bfloat16, channels_last=True
    )
    *_, full = trained(case, cuda, recipe)
    assert_frozen(model, before, mask)
    assert theta.dtype == torch.float32 and (theta != start).double().mean() > 0.8
    losses = [[entry["train_loss"] for entry in r.history] for r in (result, full)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


def test_micro_batches_after_an_injected_want_of_memory_make_the_same_steps(cuda):
    said = []

    def loss(model, batch):
        losses = example_losses(model, batch)
        if len(losses) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses

    *_, theta, _ = trained("bert", cuda, RECIPES["adamw"], loss=loss, say=said.append)
    *_, expected, _ = trained("bert", cuda, RECIPES["adamw"])
    assert said == ["out of memory: micro-batches of 2 examples instead of 4 from here on"]
    torch.testing.assert_close(theta, expected, rtol=1e-9, atol=1e-11)


def test_micro_batches_fit_the_memory_that_there_is(cuda, little_memory):
    count, thetas, said = 1 << 15, [], []
    x, y = torch.randn(count, 256, device=cuda), torch.randint(8, (count,), device=cuda)
    for limited in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 4096), nn.ReLU(), nn.Linear(4096, 8)).to(cuda)
        with MaskedParameters(model, random_mask(model, 0.01, whole=("2",))) as masked:
            if limited:
                little_memory(torch.cuda.memory_allocated() + (600 << 20))  # a layer of all examples is 512 MiB
            fit(model, lambda _: [(x, y)] * 3, masked=masked, recipe=Recipe(1, 1e-2, "sgd"), say=said.append)
            thetas.append(masked.values.detach().clone())
    assert said and said[-1].startswith("out of memory: micro-batches of")
    torch.testing.assert_close(thetas[1], thetas[0], rtol=1e-4, atol=1e-6)


def test_a_model_that_does_not_fit_at_all_ends_in_one_line(cuda, little_memory):
    model = nn.Linear(1 << 12, 1 << 12).to(cuda)
    x = torch.randn(2, 1 << 12, device=cuda)

    def loss(model, batch):
        torch.empty(1 << 30, dtype=torch.uint8, device=cuda)
        return example_losses(model, batch)

    with MaskedParameters(model, random_mask(model, 0.01, whole=("bias",))) as masked:
        little_memory(torch.cuda.memory_allocated() + (300 << 20))
        with pytest.raises(ModelError, match="out of memory with a single example"):
            fit(model, lambda _: [(x, torch.tensor([0, 1]))], masked=masked, recipe=Recipe(1, 1e-2), loss=loss)


PROTOTYPE = pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")


@contextlib.contextmanager
def waiting(mode):
    """What happens where something waits for the device: ``error`` or ``default`` (nothing)."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@PROTOTYPE
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_for_the_device(case, optimizer, cuda):
    """Losses are read every fifty steps and at an epoch's end; between, nothing asks the device for a value."""
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(1)
    make, batch = CASES[case]
    model = make().to(cuda)
    mask = random_mask(model, 0.2, whole=("classifier" if case == "bert" else "fc",))
    recipe, seen = Recipe(1, 1e-3, optimizer, clip=1.0, accumulate=2), []

    def watch(progress):
        seen.append(progress.step)
        torch.cuda.set_sync_debug_mode("error" if progress.step < 9 else "default")

    def loss(model, batch):
        with waiting("default"):  # what the model's own code does is not at issue
            return example_losses(model, batch)

    batches = [batch(i) for i in range(20)]
    with MaskedParameters(model, mask) as masked, waiting("default"):
        fit(
            model, lambda _: batches, masked=masked, recipe=recipe, loss=loss, progress=watch,
            autocast=torch.bfloat16,
        )  # fmt: skip
    assert seen == list(range(1, 11))


@PROTOTYPE
def test_a_wait_would_be_noticed(cuda):
    with waiting("error"), pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones(1, device=cuda).item()


@pytest.mark.filterwarnings("default")  # the compiler's own
def test_a_compiled_model_gives_the_same_theta(cuda):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 3)).to(cuda)
    model, thetas = copy.deepcopy(plain), []
    x, y = torch.randn(16, 32, device=cuda), torch.randint(3, (16,), device=cuda)
    mask = random_mask(plain, 0.3)
    for net in (plain, torch.compile(model)):
        before = state_of(net)
        with MaskedParameters(net, mask) as masked:
            fit(net, lambda _: [(x, y)] * 4, masked=masked, recipe=Recipe(2, 1e-2, clip=1.0))
            thetas.append(masked.values.detach().clone())
        assert_frozen(masked.model, {n.removeprefix("_orig_mod."): t for n, t in before.items()}, mask)
    torch.testing.assert_close(thetas[1], thetas[0], rtol=1e-3, atol=1e-5)
