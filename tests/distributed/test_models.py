"""Local SGD on transformers, convolutions, an LSTM, with tied weights and in bf16, equals what it should."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.training.masked import MaskedParameters

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from models import EVERY, NAMES, STEPS, build, mask_of, step_of, work  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What three real processes ended with, every model in one start of them."""
    folder = tmp_path_factory.mktemp("models")
    workers = [
        subprocess.Popen(
            [sys.executable, str(HERE / "models.py"), str(rank), str(SIZE), str(folder)],
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(SIZE)
    ]  # fmt: skip
    errors = [worker.communicate(timeout=300)[1] for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), "\n".join(errors)
    return folder


def simulate(name, every, *, sgd=False):
    """Three copies in one process: after each round every copy gets the last merge plus the mean change."""
    models = [build(name, torch.float64 if sgd else torch.float32) for _ in range(SIZE)]
    masked = [MaskedParameters(model, mask_of(model)) for model in models]
    kind = torch.optim.SGD if sgd else torch.optim.AdamW
    optimizers = [kind([m.values], lr=1e-2) for m in masked]
    anchor = masked[0].values.detach().clone()
    before = {n: b.detach().clone() for n, b in models[0].named_buffers()}
    for step in range(STEPS):
        for rank in range(SIZE):
            step_of(name, models[rank], masked[rank], optimizers[rank], rank, step)
        if (step + 1) % every and step + 1 < STEPS:
            continue
        total = masked[0].values.detach() - anchor
        for m in masked[1:]:
            total = total + (m.values.detach() - anchor)
        anchor = anchor + total / SIZE
        stats = [dict(model.named_buffers()) for model in models]
        for key in before:
            together = torch.stack([s[key] for s in stats])
            merged = together[0]
            if key.endswith("running_mean"):
                merged = together.double().mean(0)
            elif key.endswith("running_var"):
                means = torch.stack([s[key.replace("_var", "_mean")] for s in stats]).double()
                merged = together.double().mean(0) + means.var(0, correction=0)
            before[key] = merged.to(together.dtype)
        for model, m in zip(models, masked, strict=True):
            m.values.data.copy_(anchor)
            m.write_()
            for key, buffer in model.named_buffers():
                buffer.copy_(before[key])
    return models[0]


def same(got, expected, exactly):
    for name, value in expected.items():
        if exactly and "running" not in name:  # the oracle pools in float64
            assert torch.equal(got[name], value), name
        else:
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_real_processes_equal_the_simulation_and_each_other(folder, name):
    got = [load_file(folder / f"{name}-local-{rank}") for rank in range(SIZE)]
    for other in got[1:]:
        assert all(torch.equal(other[key], value) for key, value in got[0].items())
    model = simulate(name, EVERY)
    same(got[0], dict(model.named_parameters()) | dict(model.named_buffers()), exactly=True)
    moved = [key for key, value in build(name).named_parameters() if not torch.equal(got[0][key], value)]
    assert 2 * len(moved) > len(dict(build(name).named_parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_one_step_of_plain_sgd_is_gradient_averaging(folder, name):
    """The mean of one SGD step's changes is the step of the mean gradient, in float64 to rounding."""
    from models import batch

    from pipeline.losses import example_losses

    model = build(name, torch.float64)
    mask = mask_of(model).to_bool()
    for step in range(STEPS):
        start = {k: b.detach().clone() for k, b in model.named_buffers()}
        for rank in range(SIZE):  # train-mode BatchNorm uses the batch's own statistics
            for key, buffer in model.named_buffers():
                buffer.copy_(start[key])
            (example_losses(model, batch(name, rank, step, torch.float64)).mean() / SIZE).backward()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter -= 1e-2 * torch.where(mask[key], parameter.grad, 0)
                parameter.grad = None
    got = load_file(folder / f"{name}-averaging-0")
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(got[key], parameter.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_one_worker_is_plain_training_bit_for_bit(name):
    state, plain = work(name, 0).state_dict(), work(name, 0, plain=True).state_dict()
    assert all(torch.equal(state[key], value) for key, value in plain.items())
