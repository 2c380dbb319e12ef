"""Runs whose every epoch is a step of a chain: bytes, restoring, kills, the leak, and what a probe says of it."""

import itertools
import os
from types import SimpleNamespace

import pytest
import torch

from pipeline.deltas.chain import Chain
from pipeline.errors import ArtifactError, StorageError
from pipeline.schema import ScoreParams
from pipeline.tasks.base import Task
from pipeline.tasks.checkpointing import Checkpoints, Masks
from pipeline.tasks.fetch import fetch
from pipeline.tasks.fitting import fit_task
from pipeline.tasks.probe import Estimate, estimate
from pipeline.training.device import choose_device
from pipeline.training.recipe import Recipe
from pipeline.training.resume import ResumeFile

REAL = os.environ.get("FISHMASK_DATA")  # unset in the tests, so that none reads it by accident
DEVICE, EPOCHS = choose_device("cpu"), 3
SCORE = ScoreParams(examples=[32], batch_size=16)


@pytest.fixture(scope="module")
def digits(tmp_path_factory, made):
    out = tmp_path_factory.mktemp("digits")
    model = made.Model("builtin:resnet-digits")
    data = made.Data("package:scikit-learn", label=None, limit={"train": 96, "validation": 48})
    fetch("digits", kind="image", data=data, model=model, out=out)
    return Task.load(out, model, "accuracy")


class Stop(Exception):
    """The stand-in of a kill: nothing after it runs."""


class Setup:
    """One cell's run, as the stage makes it."""

    def __init__(self, task, folder, every=1, leak=False, lr=0.1, decay=5e-4, judged="validation"):
        self.folder, self.every, self.leak, self.judged = folder, every, leak, judged
        self.masks = Masks(task, "fish", 0.02, ["fc"], SCORE, 0, DEVICE)
        self.recipe = Recipe(EPOCHS, lr, "sgd", weight_decay=decay, schedule="piecewise", warmup=0.2)

    def run(self, **rest):
        task = self.masks.task
        model = task.model(0)
        mask = self.masks.choose(model, 0)
        checkpoints = Checkpoints(self.folder / "chain", {}, self.masks, mask, self.every, self.judged, 16)
        hook = rest.pop("after_epoch", lambda inner: inner)(checkpoints)
        result = fit_task(
            task, model, mask, self.recipe, 16, DEVICE, name="test", after_epoch=hook, leak=self.leak,
            resume=ResumeFile(self.folder / "state.safetensors", "test", 0.0), **rest,
        )  # fmt: skip
        return SimpleNamespace(checkpoints=checkpoints, result=result, model=model, mask=mask)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def often(digits, tmp_path_factory):
    """A whole run with a new mask every epoch."""
    setup = Setup(digits, tmp_path_factory.mktemp("often"))
    return SimpleNamespace(setup=setup, **vars(setup.run()))


def test_every_epoch_restores_to_what_was_scored(often, digits):
    chain = Chain.open(often.setup.folder / "chain")
    rows = often.checkpoints.rows()
    assert [row["epoch"] for row in rows] == [1, 2, 3] == [step.number for step in chain.steps]
    assert len({step.mask for step in chain.steps}) == EPOCHS
    for row, entry in zip(rows, often.result.history, strict=True):
        fresh = digits.model(1)  # other weights: restoring overwrites all of them
        chain.restore_(fresh, row["epoch"])
        assert digits.evaluate(fresh, "validation", 7)["accuracy"] == row["accuracy"] == entry["accuracy"]
    for (name, mine), theirs in zip(fresh.state_dict().items(), often.model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_the_bytes_told_are_those_of_the_files(often):
    sizes = {name: len(data) for name, data in files(often.setup.folder / "chain").items()}
    summary, rows = often.checkpoints.summary(), often.checkpoints.rows()
    assert summary["base_bytes"] == sizes.pop("base.safetensors")
    assert summary["checkpoint_bytes"] == sum(sizes.values()) == sum(sum(row["bytes"].values()) for row in rows)
    state = often.model.state_dict().values()
    assert summary["dense_bytes"] == sum(t.numel() * t.element_size() for t in state)
    assert summary["checkpoint_bytes"] < 0.1 * EPOCHS * summary["dense_bytes"]


@pytest.mark.parametrize("moment", ["before", "after", "logging", "lost state"])
def test_a_kill_at_any_moment_leaves_the_same_files(often, digits, tmp_path, moment):
    setup, count = Setup(digits, tmp_path), itertools.count(1)

    def during(checkpoints):
        def hook(*arguments):
            if moment == "before" and len(checkpoints.chain) == 1:
                raise Stop
            mask = checkpoints(*arguments)
            if moment in ("after", "lost state") and len(checkpoints.chain) == 2:
                raise Stop
            return mask

        return hook

    def log(*_):
        if moment == "logging" and next(count) == 2:
            raise Stop

    with pytest.raises(Stop):
        setup.run(after_epoch=during, log=log)
    if moment == "lost state":
        (tmp_path / "state.safetensors").unlink()
    again = setup.run()
    assert files(tmp_path / "chain") == files(often.setup.folder / "chain")
    assert again.checkpoints.rows() == often.checkpoints.rows()


def test_steps_of_another_training_are_taken_anew(often, digits, tmp_path):
    Setup(digits, tmp_path, lr=0.05).run()  # as where a device does not repeat itself bit for bit
    (tmp_path / "state.safetensors").unlink()
    Setup(digits, tmp_path).run()
    assert files(tmp_path / "chain") == files(often.setup.folder / "chain")


def test_a_fixed_mask_freezes_the_rest_and_the_leak_does_not(digits, tmp_path):
    kept = Setup(digits, tmp_path / "a", every=None, decay=0.05).run().checkpoints
    lost = Setup(digits, tmp_path / "b", every=None, decay=0.05, leak=True).run().checkpoints
    assert [(row["frozen_changed"], row["frozen_norm"]) for row in kept.rows()] == [(0, 1.0)] * EPOCHS
    norms = [row["frozen_norm"] for row in lost.rows()]
    assert 1 > norms[0] > norms[1] > norms[2] > 0
    assert all(row["frozen_changed"] > 0.9 * 0.98 * 308_074 for row in lost.rows())
    assert {step.count for step in lost.chain.steps} == {308_074}
    assert [row["bytes"]["coordinates"] > 0 for row in kept.rows()] == [True, False, False]
    assert lost.summary()["checkpoint_bytes"] > 10 * kept.summary()["checkpoint_bytes"]


def test_masks_are_a_matter_of_seed_and_epoch(digits):
    model = digits.model(0)
    for method in ("fish", "random"):
        one, same, other = (
            Masks(digits, method, 0.02, ["fc"], SCORE, seed, DEVICE).choose(model, epoch)
            for seed, epoch in ((0, 1), (0, 1), (0, 2))
        )
        assert one == same != other
        assert one.nnz == other.nnz == int(0.02 * 308_074)
        assert all(mask.whole("fc.weight") and mask.whole("fc.bias") for mask in (one, other))


def test_a_checkpoint_that_restores_to_something_else_ends_the_run(digits, tmp_path, monkeypatch):
    restore = Chain.restore_

    def wrong(self, model, step=-1):
        restore(self, model, step)
        model.fc.bias.data[3] += 1e-7

    monkeypatch.setattr(Chain, "restore_", wrong)
    with pytest.raises(ArtifactError, match="step 1 does not restore to what was trained"):
        Setup(digits, tmp_path).run()


@pytest.mark.parametrize(("every", "leak"), [(None, False), (1, False), (None, True)])
def test_the_probe_knows_the_disk_and_touches_nothing(digits, tmp_path, every, leak):
    setup = Setup(digits, tmp_path, every=every, leak=leak)
    mask = setup.masks.choose(digits.model(0), 0)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    found = estimate(setup.masks, mask, setup.recipe, 16, every, "validation", leak=leak)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.seconds > 0 and found.probe > 0
    assert "an estimate" in found.text(3)
    needed = setup.run().checkpoints.chain.nbytes  # less than said: values coded against the base take less room
    assert needed < 1.02 * found.nbytes < 2 * needed


def test_a_disk_that_is_too_small_is_refused_before_the_start(tmp_path):
    with pytest.raises(StorageError, match=r"MB free; this cell is estimated to need 2,000,000,000,000 MB"):
        Estimate(1.0, 1e18, 0.1).check_room(tmp_path, 1)
    Estimate(1.0, 1e3, 0.1).check_room(tmp_path, 1)


@pytest.mark.data
@pytest.mark.skipif(REAL is None, reason="FISHMASK_DATA names no data")
def test_on_real_cifar10(tmp_path, made, monkeypatch):
    """The whole code path on the real images: augmented, masks chosen anew, checkpoints restored and scored."""
    monkeypatch.setenv("FISHMASK_DATA", str(REAL))
    model = made.Model("builtin:resnet-digits")
    data = made.Data("uoft-cs/cifar10", text=None, label=None, limit={"train": 64, "test": 32})
    (tmp_path / "cifar10").mkdir()
    fetch("cifar10", kind="image", data=data, model=model, out=tmp_path / "cifar10")
    setup = Setup(Task.load(tmp_path / "cifar10", model, "accuracy"), tmp_path, judged="test")
    done = setup.run()
    assert done.checkpoints.summary()["checkpoints"] == EPOCHS
    assert done.result.history[-1]["accuracy"] == done.checkpoints.rows()[-1]["accuracy"]
