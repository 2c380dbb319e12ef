"""Whole runs under torchrun: killed, hung, diverged, started again; and one worker = plain training."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from pipeline.distributed.collectives import Collectives
from pipeline.distributed.rounds import Course
from pipeline.errors import DataError, ParamsError

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from runs import COURSES, EPOCHS, LENGTH, TIMEOUT, Net, batch, choose, train  # noqa: E402


def start(folder, name, *fault, workers=2, restarts=0):
    folder.mkdir(exist_ok=True)
    drop = {"RANK", "WORLD_SIZE", "FISHMASK_WARM"}
    env = {key: value for key, value in os.environ.items() if key not in drop}
    env |= {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent.parent}"}
    command = [sys.executable, "-m", "runs", str(workers), str(restarts), str(folder), name, *map(str, fault)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def ends(process, within=300):
    return process.communicate(timeout=within)[1]


def outcome(folder, workers=2):
    tensors = [load_file(folder / f"end-{rank}.safetensors") for rank in range(workers)]
    return tensors, [json.loads((folder / f"end-{rank}.json").read_text()) for rank in range(workers)]


def same(one, other):
    """Equal bytes and records, whatever step each life started from."""
    for a, b in zip(one[0], other[0], strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    for a, b in zip(one[1], other[1], strict=True):
        assert {k: v for k, v in a.items() if k != "resumed"} == {k: v for k, v in b.items() if k != "resumed"}


def alive(folder, workers=2):
    def runs(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    return [pid for rank in range(workers) if runs(pid := (folder / f"pid-{rank}").read_text())]


def struck(process, folder):
    """Wait for the fault."""
    while not (folder / "fault").exists():
        assert process.poll() is None
        time.sleep(0.05)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs of two courses, at the same time."""
    folder = tmp_path_factory.mktemp("whole")
    processes = {name: start(folder / name, name) for name in ("everything", "synchronous", "ddp")}
    for name, process in processes.items():
        errors = ends(process)
        assert process.returncode == 0, f"{name}: {errors}"
    return {name: outcome(folder / name) for name in processes}


def test_two_runs_at_once_end_with_equal_workers(whole):
    for tensors, ends_ in whole.values():
        assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
        assert ends_[0]["bytes"] == ends_[1]["bytes"]
        merges = [record["merge"] for record in ends_[0]["records"]]
        assert merges == list(range(1, len(merges) + 1))
        assert ends_[0]["records"][-1]["weight"] == pytest.approx(float(tensors[0]["fc.weight"].sum()))
        assert ends_[0]["records"][-1]["step"] == EPOCHS * LENGTH
    steps = [record["step"] for record in whole["everything"][1][0]["records"]]
    assert steps == [4, 6, 10, 14, 18, 22, 24]  # every 4 steps, after the dense steps, and at the end


@pytest.mark.parametrize(("name", "step"), [("everything", 19), ("synchronous", 9)])
def test_a_killed_worker_ends_the_run_and_the_next_one_goes_on_to_the_same_end(whole, tmp_path, name, step):
    first = start(tmp_path / "run", name, "kill", 1, step)
    errors = ends(first)
    assert first.returncode == 9
    assert "worker 1 (process" in errors and "was killed by SIGKILL" in errors and "Traceback" not in errors
    assert not alive(tmp_path / "run")
    second = start(tmp_path / "run", name, "kill", 1, step)
    errors = ends(second)
    assert second.returncode == 0, errors
    result = outcome(tmp_path / "run")
    assert 0 < result[1][0]["resumed"] == result[1][1]["resumed"] <= step
    same(result, whole[name])


def test_torchrun_restarts_from_the_last_merge(whole, tmp_path):
    process = start(tmp_path / "run", "everything", "kill", 0, 15, restarts=1)
    errors = ends(process)
    assert process.returncode == 0, errors
    result = outcome(tmp_path / "run")
    assert result[1][0]["resumed"] == 14
    same(result, whole["everything"])


def test_bad_input_is_one_line_and_its_exit_code(tmp_path):
    process = start(tmp_path / "run", "plain", "complain", 0, 5)
    assert ends(process) == "runs: data.csv: row 3 has no label; give it one\n"
    assert process.returncode == DataError.code


def test_a_hung_worker_trips_the_timeout(tmp_path):
    process = start(tmp_path / "run", "plain", "hang", 1, 5)
    struck(process, tmp_path / "run")
    started = time.monotonic()
    errors = ends(process)
    assert process.returncode == 9
    assert time.monotonic() - started < 6 * TIMEOUT
    assert "rank 0 of 2: the exchange with the other workers failed" in errors
    assert not alive(tmp_path / "run")


def test_a_stopped_worker_trips_the_timeout_too(tmp_path):
    """SIGSTOP, as a machine that freezes: it hears no SIGTERM, and must not outlive the run either."""
    process = start(tmp_path / "run", "plain", "stop", 1, 5)
    struck(process, tmp_path / "run")
    errors = ends(process)
    assert process.returncode == 9
    said = [
        line for line in errors.splitlines() if "rank 0 of 2: the exchange with the other workers failed" in line
    ]
    assert len(said) == 1 and "run the same command again to go on from the last merge" in said[0]
    assert "Traceback" not in errors
    assert not alive(tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_says_so_and_goes_on_to_the_same_end(whole, tmp_path, number):
    process = start(tmp_path / "run", "everything", "pause", 1, 15)
    struck(process, tmp_path / "run")
    process.send_signal(number)
    errors = ends(process)
    assert process.returncode == 143
    assert errors.splitlines()[-1].startswith("runs: stopped, and the workers with it; run the same command again")
    assert "Traceback" not in errors
    assert not alive(tmp_path / "run")
    process = start(tmp_path / "run", "everything", "pause", 1, 15)
    assert ends(process) == "" and process.returncode == 0
    result = outcome(tmp_path / "run")
    assert result[1][0]["resumed"] >= 14
    same(result, whole["everything"])


def test_workers_end_with_their_launcher(tmp_path):
    """Also one that is stopped, which no other signal would end."""
    process = start(tmp_path / "run", "plain", "stop", 1, 5)
    struck(process, tmp_path / "run")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 30
    while alive(tmp_path / "run") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(tmp_path / "run")


@pytest.mark.parametrize("name", ["everything", "synchronous"])
def test_when_one_diverges_all_stop_together(tmp_path, name):
    process = start(tmp_path / "run", name, "diverge", 1, 13, workers=3)
    errors = ends(process)
    assert process.returncode == 0, errors
    for rank in range(3):
        assert "diverged" in (tmp_path / "run" / f"diverged-{rank}").read_text()


@pytest.mark.parametrize("name", ["plain", "ddp"])
def test_one_worker_is_plain_fit_bit_for_bit(name):
    model, rounds, result = train(name, Collectives())
    plain, _, expected = train(name, Collectives(), sync=False)
    state, other = model.state_dict(), plain.state_dict()
    assert all(torch.equal(state[key], other[key]) for key in state)
    assert [entry["train_loss"] for entry in result.history] == [e["train_loss"] for e in expected.history]
    assert sum(rounds.bytes.values()) == 0


def test_synchronous_training_is_gradient_averaging(whole):
    """Against two models by hand: mean gradient, one optimizer, each its own BatchNorm statistics."""
    torch.manual_seed(0)
    models = [Net().train() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    mask = choose(COURSES["ddp"], Collectives(), 0).to_bool()
    optimizer = torch.optim.AdamW(models[0].parameters(), lr=0.01, weight_decay=0.0)
    for step in range(EPOCHS * LENGTH):
        for rank, model in enumerate(models):
            x, y = batch(rank, 100 * (step // LENGTH) + step % LENGTH, torch.float32)
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
        for (name, own), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            own.grad = torch.where(mask[name], (own.grad + other.grad) / 2, 0)
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / (EPOCHS * LENGTH))
        with torch.no_grad():
            for name, parameter in models[0].named_parameters():  # decay of the masked values alone
                parameter -= torch.where(mask[name], optimizer.param_groups[0]["lr"] * 0.1 * parameter, 0)
        optimizer.step()
        for (_, own), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            other.data.copy_(own.data)
    for name, parameter in models[0].named_parameters():
        torch.testing.assert_close(whole["ddp"][0][0][name], parameter.detach(), rtol=1e-3, atol=1e-5)


def test_synchronous_training_has_no_local_steps_to_set():
    with pytest.raises(ParamsError, match="own_masks"):
        Course(every=0, steps_per_epoch=1, steps=1, own_masks=True)
