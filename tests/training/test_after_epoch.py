"""Masks that change between epochs: what stays, what moves, and that a kill changes nothing; and the old leak."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.errors import Interrupted
from pipeline.fisher import fisher_diagonal
from pipeline.losses import Batch
from pipeline.masks.mask import Mask
from pipeline.training.leak import LeakyParameters
from pipeline.training.loop import Recipe, fit
from pipeline.training.masked import MaskedParameters
from pipeline.training.resume import ResumeFile

EPOCHS, BATCHES = 4, 3
STEPS = EPOCHS * BATCHES


pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.4), nn.Linear(12, 3))


def batches(epoch: int) -> list[Batch]:
    g = torch.Generator().manual_seed(10 + epoch)
    return [(torch.randn(6, 5, generator=g), torch.randint(3, (6,), generator=g)) for _ in range(BATCHES)]


def scored(model: nn.Module, epoch: int) -> Mask:
    mask = Mask.top_k(fisher_diagonal(model, batches(epoch)), 0.3)
    mask.info["epoch"] = epoch
    return mask


def remask(entry, model, mask):
    return scored(model, int(entry["epoch"]))


def recipe(optimizer: str = "adamw", **rest: Any) -> Recipe:
    return Recipe(EPOCHS, 0.05, optimizer, weight_decay=0.1, warmup=0.2, clip=1.0, **rest)


def run(path: Path | None = None, after_epoch=remask, kind=MaskedParameters, optimizer="adamw", **rest: Any):
    """Train; returns the result, and all bytes that the run determines."""
    model = network()
    resume = ResumeFile(path, "test", 0.0) if path else None
    with kind(model, scored(model, 0)) as masked:
        result = fit(
            model, batches, masked=masked, recipe=recipe(optimizer), resume=resume, after_epoch=after_epoch, **rest
        )
        state = {"theta": masked.values, **model.state_dict()}
        ends = {name: t.detach().numpy().tobytes().hex() for name, t in state.items()}
        more = {"mask": masked.chosen.digest, "info": masked.chosen.info, "drawn": torch.rand(1).item()}
        return result, {**ends, **more, "history": json.dumps(result.history)}


class Stop(Exception):
    """The stand-in of a kill: nothing after it runs."""


@pytest.mark.parametrize(
    ("kind", "optimizer"), [(MaskedParameters, "adamw"), (MaskedParameters, "sgd"), (LeakyParameters, "sgd")]
)
def test_with_changing_masks_it_resumes_from_every_step(tmp_path: Path, kind: type, optimizer: str) -> None:
    expected = run(kind=kind, optimizer=optimizer)[1]
    for last in range(1, STEPS + 1):
        path = tmp_path / f"{last}.safetensors"

        def stop(progress: Any, last: int = last) -> None:
            if progress.step == last:
                raise Stop

        with pytest.raises(Stop):
            run(path, kind=kind, optimizer=optimizer, progress=stop)
        result, ends = run(path, kind=kind, optimizer=optimizer)
        assert ends == expected
        assert result.resumed_from == (last - 1 or None)


@pytest.mark.parametrize("how", ["kill", "signal"])
def test_a_stop_in_the_middle_of_choosing_a_mask_changes_nothing(tmp_path: Path, how: str) -> None:
    expected = run()[1]

    def interrupted(entry, model, mask):
        if entry["epoch"] == 2:
            torch.rand(3)
            if how == "kill":
                raise Stop
            os.kill(os.getpid(), signal.SIGTERM)
        return remask(entry, model, mask)

    with pytest.raises(Stop if how == "kill" else Interrupted):
        run(tmp_path / "a", after_epoch=interrupted)
    result, ends = run(tmp_path / "a")
    assert ends == expected and result.resumed_from == 2 * BATCHES


def test_a_state_with_another_networks_mask_changes_nothing(tmp_path: Path, monkeypatch) -> None:
    from pipeline.training import resume as room

    path = tmp_path / "a"
    stopped = iter(range(STEPS))
    with pytest.raises(Interrupted):
        run(path, should_stop=lambda: next(stopped) == BATCHES + 1)
    whole = room.ResumeFile.load

    def foreign(self):
        saved, note = whole(self)
        other = Mask.from_bool({"0.weight": torch.ones(2, 2, dtype=torch.bool)})
        return (room.Saved(saved.position, saved.tensors, saved.scalars, other), note) if saved else (saved, note)

    monkeypatch.setattr(room.ResumeFile, "load", foreign)
    result, ends = run(path)
    assert ends == run()[1]
    assert result.resumed_from is None and "another model" in result.note


def test_a_mask_that_stays_is_the_run_without_the_hook() -> None:
    seen = []

    def look(entry, model, mask):
        flags = {p.requires_grad for p in model.parameters()}
        seen.append((entry["epoch"], model.training, flags, mask.info.get("epoch")))
        model.train()
        torch.rand(3)

    assert run(after_epoch=look)[1] == run(after_epoch=None)[1]
    assert seen == [(epoch, False, {True}, 0) for epoch in range(1, EPOCHS + 1)]


def test_only_the_masks_of_the_epochs_so_far_have_changed() -> None:
    base, union, masks = network(), None, []

    def look(entry, model, mask):
        nonlocal union
        union = mask if union is None else union | mask
        for name, chosen in union.to_bool().items():
            assert torch.equal(base.get_parameter(name)[~chosen], model.get_parameter(name)[~chosen]), name
        masks.append(mask.digest)
        return remask(entry, model, mask)

    run(after_epoch=look)
    assert len(set(masks)) == EPOCHS
    assert union.nnz < union.index.total


def test_changed_masks_keep_the_moments_of_what_stays() -> None:
    """A mask left for an epoch and taken up again, against a plain loop that moves the moments by hand."""
    model, plain = network(), network()
    one, two = scored(model, 0), scored(model, 7)
    order = {1: two, 2: one, 3: two}
    with MaskedParameters(model, one) as masked:
        fit(model, batches, masked=masked, recipe=recipe("sgd"), after_epoch=lambda e, m, _: order.get(e["epoch"]))
    dense = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    torch.manual_seed(0)
    plain.train()
    mask, step = one.to_bool(), 0
    from pipeline.training.schedule import make_schedule

    factor = make_schedule("linear", STEPS, 0.2)
    for epoch in range(EPOCHS):
        for x, y in batches(epoch):
            plain.zero_grad()
            F.cross_entropy(plain(x), y).backward()
            grads = {n: torch.where(mask[n], p.grad, 0.0) for n, p in plain.named_parameters()}
            norm = torch.cat([g.reshape(-1) for g in grads.values()]).norm()
            with torch.no_grad():
                for n, p in plain.named_parameters():
                    g = grads[n] * torch.clamp(1.0 / (norm + 1e-6), max=1.0) + 0.1 * p
                    dense[n] = torch.where(mask[n], 0.9 * dense[n] + g, 0.0)
                    p -= torch.where(mask[n], 0.05 * factor(step) * (g + 0.9 * dense[n]), 0.0)
            step += 1
        if epoch + 1 in order:
            mask = order[epoch + 1].to_bool()
            dense = {n: torch.where(mask[n], d, 0.0) for n, d in dense.items()}
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_suspended_gives_the_model_back_and_takes_it_again() -> None:
    model = network()
    model[0].bias.requires_grad_(False)
    free = fisher_diagonal(model, batches(0))
    with MaskedParameters(model, Mask.top_k(free, 0.1)) as masked:
        theta, inside = masked.values.detach().clone(), {n for n, p in model.named_parameters() if p.requires_grad}
        with pytest.raises(Stop), masked.suspended():
            again = fisher_diagonal(model, batches(0))
            assert all(torch.equal(again[name], free[name]) for name in free) and again.keys() == free.keys()
            raise Stop
        assert {n for n, p in model.named_parameters() if p.requires_grad} == inside
        F.cross_entropy(model(batches(0)[0][0]), batches(0)[0][1]).backward()
        assert masked.values.grad.abs().sum() > 0 and torch.equal(masked.values, theta)
        assert all(p.grad is None for p in model.parameters())


def leaky_by_hand(steps: int, mask: Mask) -> nn.Module:
    """The first implementation: torch's SGD on everything, gradients multiplied by the mask."""
    model, flags = network(), mask.to_bool()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1)
    torch.manual_seed(0)
    model.train()
    for x, y in batches(0)[:steps]:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for name, parameter in model.named_parameters():
            parameter.grad *= flags[name]
        optimizer.step()
    return model


def test_the_leak_is_the_first_implementations_and_masked_training_has_none() -> None:
    base, ends = network(), {}
    mask = scored(base, 0)
    for kind in (LeakyParameters, MaskedParameters):
        model = network()
        with kind(model, mask) as masked:
            assert masked.chosen == mask
            settings = Recipe(1, 0.05, "sgd", weight_decay=0.1, schedule="constant")
            fit(model, lambda _: batches(0), masked=masked, recipe=settings)
            ends[kind] = model, masked.mask, masked.values.numel()
    theirs = leaky_by_hand(BATCHES, mask)
    leaky, touched, size = ends[LeakyParameters]
    assert touched.nnz == size == touched.index.total
    frozen = {name: ~flags for name, flags in mask.to_bool().items()}
    for name, parameter in leaky.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=1e-5, atol=1e-7)
        rest, before = parameter[frozen[name]], base.get_parameter(name)[frozen[name]]
        assert (rest.abs() < before.abs())[before != 0].all()
        assert torch.equal(ends[MaskedParameters][0].get_parameter(name)[frozen[name]], before)
    assert ends[MaskedParameters][2] == mask.nnz


def test_momentum_of_a_dropped_coordinate_goes_on_in_the_leak_alone() -> None:
    for kind, moves in ((LeakyParameters, True), (MaskedParameters, False)):
        model = network()
        one = scored(model, 0)
        other = Mask(one.index, {"4.bias": torch.tensor([0])}) | Mask(one.index, {"0.bias": torch.tensor([1])})
        gone, marks = one - other, []

        def look(entry, model, mask, gone=gone, other=other, marks=marks):
            marks.append(
                torch.cat([model.get_parameter(n).detach().reshape(-1)[gone.indices[n]] for n in gone.index])
            )
            return other

        with kind(model, one) as masked:
            settings = Recipe(2, 0.05, "sgd", weight_decay=0.0, schedule="constant")
            fit(model, batches, masked=masked, recipe=settings, after_epoch=look)
        assert (not torch.equal(*marks)) == moves
