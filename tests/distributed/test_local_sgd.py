"""W real processes = a simulation in one process, bit for bit; one worker = plain training; bytes are counted."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from pipeline.distributed.local_sgd import LocalSGD
from pipeline.errors import DivergedError, ParamsError
from pipeline.training.masked import MaskedParameters

sys.path.insert(0, str(Path(__file__).parent))
import cases  # noqa: E402
from cases import CASES, OPTIMIZERS, Case, batch, build, local_step, mask_of, snapshot  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "repeatable")
TEAMS = [(2, "cpu"), (4, "cpu")]
TEAMS += [pytest.param((2, "cuda"), marks=pytest.mark.cuda)] if torch.cuda.is_available() else []


@pytest.fixture(scope="module", params=TEAMS, ids=lambda team: "-".join(map(str, team)))
def real(request, tmp_path_factory):
    """What W real processes ended with (on CUDA they share the GPU): every case, in one start of them.

    The simulation is then made on the same kind of device.
    """
    size, device = request.param
    folder = tmp_path_factory.mktemp(f"workers-{size}-{device}")
    script = str(Path(__file__).parent / "cases.py")
    workers = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(size), str(folder)], stderr=subprocess.PIPE, text=True,
            env=os.environ | {"CASES_DEVICE": device},
        )
        for rank in range(size)
    ]  # fmt: skip
    errors = [worker.communicate()[1] for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), "\n".join(errors)
    results = {name: [load_file(folder / f"{name}-{rank}.safetensors") for rank in range(size)] for name in CASES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cases, "DEVICE", torch.device(device))
        yield size, results, folder


def simulate(case, size):
    """W workers in one process, in plain words: dense tensors, no LocalSGD; adds in the order of the ranks."""
    models = [build(case.weights) for _ in range(size)]
    masks = [mask_of(case, rank) for rank in range(size)]
    masked = [MaskedParameters(model, mask) for model, mask in zip(models, masks, strict=True)]
    optimizers = [OPTIMIZERS[case.optimizer]([m.values]) for m in masked]
    wide = torch.float64 if case.weights == torch.float64 else torch.float32
    anchor = {name: p.detach().to(wide, copy=True).reshape(-1) for name, p in models[0].named_parameters()}
    velocity = {name: None for name in anchor}
    errors = None
    since = merges = 0
    for step in range(case.steps + 1):
        if step < case.steps:
            for rank in range(size):
                local_step(case, models[rank], masked[rank], optimizers[rank], rank, step)
            since += 1
        if not since or (since < case.every and step < case.steps):
            continue
        since, merges = 0, merges + 1
        union = masks[0]
        for mask in masks[1:]:
            union = union | mask
        changes = []
        for rank in range(size):
            change = {name: torch.zeros_like(flat) for name, flat in anchor.items()}
            for name, part in masked[rank].segments.items():
                at = masks[rank].indices[name]
                change[name][at] = masked[rank].values.detach()[part.start : part.stop] - anchor[name][at]
            changes.append(torch.cat([change[name][union.indices[name]] for name in anchor]))
        if case.wire == torch.bfloat16:
            errors = errors or [torch.zeros_like(changes[0]) for _ in range(size)]
            sent = [(c + e).bfloat16() for c, e in zip(changes, errors, strict=True)]
            errors = [c + e - s for c, e, s in zip(changes, errors, sent, strict=True)]
            exact = in_order([s.float() for s in sent])
            total = exact.bfloat16().float()
            each = -(-len(exact) // size)  # rank r adds up the r-th part, and keeps what rounding the sum lost
            for rank in range(size):
                part = slice(rank * each, (rank + 1) * each)
                errors[rank][part] += (exact - total)[part]
        else:
            total = in_order(changes)
        start = 0
        for name in anchor:
            at = union.indices[name]
            part = total[start : start + len(at)]
            start += len(at)
            trainers = sum(torch.isin(at, mask.indices[name]).to(part.device, wide) for mask in masks)
            part = part / (
                torch.ones_like(part) if case.average == "sum" and name[:2] not in case.head else trainers
            )
            if case.outer is not None:  # torch.optim.SGD with Nesterov momentum, by hand
                settings, grad = case.outer.keywords, -part
                if velocity[name] is None:
                    velocity[name] = torch.zeros_like(anchor[name])
                    velocity[name][at] = grad
                else:
                    velocity[name][at] = velocity[name][at] * settings["momentum"] + grad
                step_ = grad + settings["momentum"] * velocity[name][at]
                anchor[name][at] = anchor[name][at] - settings["lr"] * step_
            else:
                anchor[name][at] = anchor[name][at] + part
        stats = [dict(model.named_buffers()) for model in models]
        mean, var = (torch.stack([s[f"norm.running_{n}"].double() for s in stats]) for n in ("mean", "var"))
        seen = torch.stack([s["seen"].double() for s in stats]).mean(0)
        count = int(stats[0]["norm.num_batches_tracked"])
        pooled = {
            "norm.running_mean": mean.mean(0), "norm.running_var": var.mean(0) + mean.var(0, correction=0),
            "norm.num_batches_tracked": torch.tensor(count), "seen": seen,
        }  # fmt: skip
        for rank in range(size):
            for name, parameter in models[rank].named_parameters():
                at = union.indices[name]
                parameter.data.view(-1)[at] = anchor[name][at].to(case.weights)
                if name in masked[rank].segments:
                    part = masked[rank].segments[name]
                    masked[rank].values.data[part.start : part.stop] = anchor[name][masks[rank].indices[name]]
            for name, value in pooled.items():
                dict(models[rank].named_buffers())[name].copy_(value)
        if merges == case.renewed and step < case.steps:
            errors = None
            old, masks = union, [mask_of(case, rank, 1) for rank in range(size)]
            for rank in range(size):
                masked[rank].remask_(masks[rank], optimizers[rank])
            new = masks[0]
            for mask in masks[1:]:
                new = new | mask
            for name, moment in velocity.items():
                if moment is not None:
                    keep = torch.zeros_like(moment, dtype=torch.bool)
                    keep[(old & new).indices[name]] = True
                    moment[~keep] = 0
    return [snapshot(model, m) for model, m in zip(models, masked, strict=True)]


def in_order(tensors):
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


@pytest.mark.parametrize("name", CASES)
def test_real_processes_equal_the_simulation(real, name):
    size, results, _ = real
    for rank, expected in enumerate(simulate(CASES[name], size)):
        for key, value in expected.items():
            got = results[name][rank][key]
            if (
                "norm." in key or key == "seen"
            ):  # the oracle pools in float64; training on goes the other way round
                torch.testing.assert_close(
                    got, value, rtol=1e-2 if got.dtype == torch.bfloat16 else 1e-5, atol=1e-6
                )
            elif CASES[name].outer is not None:
                torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(got, value), (rank, key, (got - value).abs().max())


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_are_bitwise_equal_at_the_end(real, name):
    size, results, _ = real
    for rank in range(1, size):
        for key, value in results[name][0].items():
            if key != "theta" or not CASES[name].own:
                assert key.startswith(("bytes", "handed")) or torch.equal(results[name][rank][key], value), (
                    rank,
                    key,
                )


@pytest.mark.parametrize("name", CASES)
def test_counted_bytes_are_those_handed_to_the_collectives(real, name):
    size, results, _ = real
    for result in results[name]:
        assert result["bytes"] == result["handed"] > 0
        if CASES[name].renewed is None:
            width = {torch.bfloat16: 2, torch.float64: 8}.get(CASES[name].wire, 4)
            width = 8 if CASES[name].weights == torch.float64 else width
            part = -(-int(result["k"]) // size)
            assert result["bytes values"] == result["merges"] * 2 * (size - 1) * part * width


def test_another_model_and_another_mask_are_refused_on_every_rank(real):
    size, _, folder = real
    for rank in range(size):
        model, mask = (folder / f"refused-{rank}").read_text().splitlines()
        assert model.startswith("the model on rank 1 differs from rank 0's")
        assert mask.startswith("the mask on rank 1 differs from rank 0's")


def test_one_step_of_plain_sgd_is_gradient_averaging(real):
    size, results, _ = real
    case = CASES["one step, plain SGD"]
    model = build(case.weights)
    models = [copy.deepcopy(model) for _ in range(size)]
    mask = mask_of(case, 0).to_bool()
    for step in range(case.steps):
        for rank, copied in enumerate(models):  # BatchNorm normalises with the batch's own statistics: no exchange
            copied.load_state_dict(model.state_dict())
            x, y = batch(rank, step, case.weights)
            copied.zero_grad()
            F.cross_entropy(copied(x), y).backward()
        for name, parameter in model.named_parameters():
            grads = [dict(copied.named_parameters())[name].grad for copied in models]
            parameter.data -= 0.1 * torch.where(mask[name].to(parameter.device), torch.stack(grads).mean(0), 0)
    for name, parameter in model.named_parameters():
        got = results["one step, plain SGD"][0][name]
        torch.testing.assert_close(got, parameter.detach().cpu(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["mean", "sum, head averaged", "bf16 on the wire", "own masks", "bf16 weights"])
def test_one_worker_is_plain_training_bit_for_bit(name):
    case = CASES[name]
    model = build(case.weights)
    masked = MaskedParameters(model, mask_of(case, 0))
    optimizer = OPTIMIZERS[case.optimizer]([masked.values])
    for step in range(case.steps):
        local_step(case, model, masked, optimizer, 0, step)
    expected = snapshot(model, masked)

    model = build(case.weights)
    masked = MaskedParameters(model, mask_of(case, 0))
    optimizer = OPTIMIZERS[case.optimizer]([masked.values])
    sync = LocalSGD(
        masked, optimizer, every=case.every, average=case.average, dtype=case.wire, own_masks=case.own,
        head=case.head, debug=True,
    )  # fmt: skip
    for step in range(case.steps):
        local_step(case, model, masked, optimizer, 0, step)
        sync.step()
    sync.finish()
    got = snapshot(model, masked)
    assert all(torch.equal(got[key], value) for key, value in expected.items())
    assert (sync.size, sync.bytes_sent, sync.merges) == (1, 0, -(-case.steps // case.every))


def test_arguments_out_of_range_are_refused():
    model = build(torch.float32)
    masked = MaskedParameters(model, mask_of(Case(), 0))
    optimizer = OPTIMIZERS["sgd"]([masked.values])
    for key, value in {"every": 0, "average": "median", "dtype": torch.float16}.items():
        with pytest.raises(ParamsError, match=key):
            LocalSGD(masked, optimizer, **{"every": 1} | {key: value})
    sync = LocalSGD(masked, optimizer, every=5)
    sync.step()
    with pytest.raises(ParamsError, match="call finish"):
        sync.remask_(mask_of(Case(), 0, 1))


def test_an_outer_step_that_is_not_finite_diverges():
    model = build(torch.float32)
    masked = MaskedParameters(model, mask_of(Case(), 0))
    sync = LocalSGD(
        masked, OPTIMIZERS["sgd"]([masked.values]), every=1, outer=lambda p: torch.optim.SGD(p, lr=1.0)
    )
    masked.values.data[3] = float("nan")
    with pytest.raises(DivergedError, match="merge 1 of 1 workers"):
        sync.step()
