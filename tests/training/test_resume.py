"""A run that is killed and started again ends as if it had never been stopped."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.errors import DivergedError, Interrupted, StorageError
from pipeline.losses import example_losses
from pipeline.training import ledger
from pipeline.training import resume as room
from pipeline.training.fingerprint import fingerprint
from pipeline.training.resume import ResumeFile

# One run, executed here and in processes that are killed: BatchNorm, dropout, accumulation, a ragged last batch.
RUN = '''
import json, sys, time
import torch
from torch import nn
from pipeline.masks.mask import Mask
from pipeline.training.loop import Recipe, fit
from pipeline.training.masked import MaskedParameters
from pipeline.training.fingerprint import fingerprint
from pipeline.training.resume import ResumeFile

EPOCHS, BATCHES, ACCUMULATE = 3, 7, 2
STEPS = EPOCHS * 4


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.4), nn.Linear(12, 3))


def batches(epoch):
    g = torch.Generator().manual_seed(10 + epoch)
    sizes = [6] * (BATCHES - 1) + [3]
    return [(torch.randn(n, 5, generator=g), torch.randint(3, (n,), generator=g)) for n in sizes]


def evaluate(model):
    return {"mean": model(torch.ones(4, 5)).mean(), "undefined": float("nan")}


def run(path=None, every_s=0.0, optimizer="adamw", lr=0.05, evaluate=evaluate, **rest):
    """Train; returns the result, and all bytes that the run determines."""
    torch.set_num_threads(1)
    model = network()
    g = torch.Generator().manual_seed(2)
    mask = Mask.from_bool({n: torch.rand(p.shape, generator=g) < 0.5 for n, p in model.named_parameters()})
    recipe = Recipe(EPOCHS, lr, optimizer, weight_decay=0.1, warmup=0.2, clip=1.0, accumulate=ACCUMULATE)
    resume = ResumeFile(path, fingerprint(data="random", batch=6), every_s) if path else None
    with MaskedParameters(model, mask) as masked:
        result = fit(model, batches, masked=masked, recipe=recipe, evaluate=evaluate, resume=resume, **rest)
        state = {"theta": masked.values, **model.state_dict()}
    ends = {name: t.detach().numpy().tobytes().hex() for name, t in state.items()}
    return result, {**ends, "history": json.dumps(result.history), "drawn": torch.rand(1).item()}


def show(progress):
    print(progress.step, flush=True)
    time.sleep(0.02)
'''
CHILD = """
result, ends = run(sys.argv[1], progress=show)
print(json.dumps([result.resumed_from, result.note, ends]))
"""
scope: dict[str, Any] = {}
exec(RUN, scope)
run: Callable[..., tuple[Any, dict[str, Any]]] = scope["run"]
STEPS: int = scope["STEPS"]


class Stop(Exception):
    """The stand-in of a kill: nothing after it runs."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """What an uninterrupted run ends with."""
    return run()[1]


def start(path: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen(
        [sys.executable, "-c", RUN + CHILD, str(path)], stdout=-1, stderr=-1, text=True, env=env
    )


def kill_after(child: subprocess.Popen[str], step: int, seconds: float, number: int) -> tuple[int, str]:
    """Send a signal some time after the child has done a step."""
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= step:
            time.sleep(seconds)
            child.send_signal(number)
            break
    _, errors = child.communicate(timeout=60)
    return child.returncode, errors


def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path: Path, whole: dict[str, Any]) -> None:
    path = tmp_path / "state" / "resume.safetensors"
    moments = random.Random()  # other moments each time: in a step, in a save, in between
    for step, number in ((2, signal.SIGKILL), (5, signal.SIGTERM), (8, signal.SIGKILL)):
        code, errors = kill_after(start(path), step, moments.uniform(0, 0.04), number)
        if number == signal.SIGKILL:
            assert code == -number, errors
        else:
            assert code == 1 and "Interrupted: training stopped in epoch" in errors, errors
            assert "During handling" not in errors
    child = start(path)
    out, errors = child.communicate(timeout=60)
    assert child.returncode == 0, errors
    resumed_from, note, ends = json.loads(out.splitlines()[-1])
    assert resumed_from >= 7 and note == ""
    assert ends == whole
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_it_resumes_from_every_step(tmp_path: Path, optimizer: str) -> None:
    expected = run(optimizer=optimizer)[1]
    for last in range(1, STEPS + 1):
        path = tmp_path / f"{last}.safetensors"

        def stop(progress: Any, last: int = last) -> None:
            if progress.step == last:
                raise Stop

        with pytest.raises(Stop):
            run(path, optimizer=optimizer, progress=stop)
        result, ends = run(path, optimizer=optimizer)
        assert ends == expected
        assert result.resumed_from == (last - 1 or None)  # the step that was cut off is done again


def test_losses_not_yet_read_are_in_the_saved_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any]
) -> None:
    # On a GPU the losses stay on the device for many steps.
    monkeypatch.setattr(ledger.Ledger, "read_every", property(lambda _: 50, lambda *_: None), raising=False)
    path = tmp_path / "resume.safetensors"
    stopped(path)
    result, ends = run(path)
    assert ends == whole and result.resumed_from == 5


def test_a_kill_during_evaluation_or_logging_changes_nothing(tmp_path: Path, whole: dict[str, Any]) -> None:
    path = tmp_path / "resume.safetensors"

    def fail(*_: Any) -> Any:
        torch.rand(3)
        raise Stop

    with pytest.raises(Stop):
        run(path, evaluate=fail)
    with pytest.raises(Stop):
        run(path, log=fail)
    result, ends = run(path)
    assert ends == whole and result.resumed_from == 4


def test_a_logged_step_is_the_same_after_a_kill(tmp_path: Path) -> None:
    def logs(into: dict[int, dict[str, float]]) -> Callable[[dict[str, float], int], None]:
        return lambda values, step: into.update({step: values})

    def stop(progress: Any) -> None:
        if progress.step == 6:
            raise Stop

    once: dict[int, dict[str, float]] = {}
    twice: dict[int, dict[str, float]] = {}
    run(log=logs(once), log_every=3)
    with pytest.raises(Stop):
        run(tmp_path / "a", log=logs(twice), log_every=3, progress=stop)
    run(tmp_path / "a", log=logs(twice), log_every=3)
    assert json.dumps(once) == json.dumps(twice) and list(once) == [3, 4, 6, 8, 9, 12]


def test_sigterm_finishes_the_step_saves_and_raises(tmp_path: Path, whole: dict[str, Any]) -> None:
    path = tmp_path / "resume.safetensors"
    before = signal.getsignal(signal.SIGTERM)

    def interrupt(progress: Any) -> None:
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match=r"epoch 1 of 3, after step 3; .* go on from .*resume\.safetensors") as e:
        run(path, every_s=3600, progress=interrupt)
    assert e.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    result, ends = run(path, every_s=3600)
    assert ends == whole and result.resumed_from == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_breaks_into_an_evaluation(tmp_path: Path, whole: dict[str, Any], number: int) -> None:
    path = tmp_path / "resume.safetensors"
    went_on = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        torch.rand(3)
        os.kill(os.getpid(), number)
        went_on.append(True)
        return {}

    with pytest.raises(Interrupted, match="epoch 1 of 3, after step 4"):
        run(path, every_s=3600, evaluate=evaluate)
    assert not went_on
    result, ends = run(path)
    assert ends == whole and result.resumed_from == 4


def test_signals_are_left_alone_outside_the_main_thread(tmp_path: Path, whole: dict[str, Any]) -> None:
    ends: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: ends.append(run(tmp_path / "a")[1]))
    thread.start()
    thread.join()
    assert ends == [whole]


def test_a_finished_run_returns_its_end_at_once(tmp_path: Path, whole: dict[str, Any]) -> None:
    path = tmp_path / "resume.safetensors"

    def slow(model: nn.Module) -> dict[str, Any]:
        time.sleep(0.05)
        metrics: dict[str, Any] = scope["evaluate"](model)
        return metrics

    first, _ = run(path, every_s=3600, evaluate=slow)
    second, ends = run(path, progress=lambda _: pytest.fail("it trained again"))
    assert ends == whole
    assert second.resumed_from == first.steps == second.steps == STEPS
    assert second.seconds >= 0.15 and first.resumed_from is None  # the first life's evaluations are counted


def test_clear_removes_the_file_and_what_a_kill_left(tmp_path: Path) -> None:
    path = tmp_path / "resume.safetensors"
    run(path)
    (tmp_path / ".resume.safetensors.0123456789ab.tmp").write_bytes(b"half a save")
    (tmp_path / "another").write_bytes(b"")
    ResumeFile(path, "").clear()
    assert [entry.name for entry in tmp_path.iterdir()] == ["another"]
    ResumeFile(path, "").clear()


def stopped(path: Path, **rest: Any) -> None:
    steps: list[int] = []
    with pytest.raises(Interrupted):
        run(path, progress=lambda p: steps.append(p.step), should_stop=lambda: len(steps) == 5, **rest)


def test_the_state_of_another_run_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "resume.safetensors"
    stopped(path)
    result, ends = run(path, lr=0.01)
    assert ends == run(lr=0.01)[1]
    assert result.resumed_from is None and result.note == f"{path} is the state of another run; started anew"


def test_other_initial_values_are_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "resume.safetensors"
    stopped(path)
    network = scope["network"]

    def shifted() -> nn.Module:
        model = network()
        nn.init.ones_(model[0].bias)
        return model

    monkeypatch.setitem(scope, "network", shifted)
    result, ends = run(path)
    assert result.resumed_from is None and result.note.endswith("another run; started anew")
    assert ends == run()[1]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "foreign", "newer"])
def test_a_damaged_state_is_not_used(tmp_path: Path, whole: dict[str, Any], damage: str) -> None:
    path = tmp_path / "resume.safetensors"
    stopped(path)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-5] ^= 4
    changed = {"cut": data[:-9], "empty": b"", "foreign": b"\x80\x04K\x01."}.get(damage, data)
    path.write_bytes(changed)
    if damage == "newer":
        room.write_file(path, format=room.FORMAT, version=room.VERSION + 1, meta={}, sections={})
    result, ends = run(path)
    assert ends == whole
    assert result.resumed_from is None
    assert result.note.startswith("the saved state cannot be used, started anew (") and "\n" not in result.note


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    values = nn.Parameter(torch.ones(3))
    position = room.Position()
    saved = room.Saved(position, {"theta": torch.zeros(3), "buffer.mean": torch.zeros(2)}, {})
    with pytest.raises(room.MismatchError, match="does not fit"):
        saved.restore(nn.Linear(1, 1), values, torch.optim.SGD([values], lr=1.0))
    assert torch.equal(values.detach(), torch.ones(3))


def test_a_diverged_run_leaves_no_state(tmp_path: Path) -> None:
    path = tmp_path / "resume.safetensors"
    calls: list[int] = []

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        calls.append(1)
        return example_losses(model, batch) * (float("nan") if len(calls) == 9 else 1.0)

    with pytest.raises(DivergedError):
        run(path, loss=loss)
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be created"):
        run(tmp_path / "file" / "resume.safetensors")


def test_saves_are_spread_by_time_and_by_what_they_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(room, "time", SimpleNamespace(monotonic=lambda: now[0]))
    cost = [0.5]

    def write(*_: Any, **__: Any) -> int:
        now[0] += cost[0]
        return 0

    monkeypatch.setattr(room, "write_file", write)
    file = ResumeFile(tmp_path / "a", "", every_s=15.0)
    model, theta = nn.Linear(1, 1), torch.zeros(1)

    def due_after() -> float:
        begin = now[0]
        while not file.due():
            now[0] += 0.5
        return now[0] - begin

    assert due_after() == 15.0
    file.save(room.Position(), model, theta)
    assert due_after() == 15.0
    cost[0] = 2.0  # dear: at most 5 % of the time
    file.save(room.Position(), model, theta)
    assert due_after() == 40.0
    assert ResumeFile(tmp_path / "a", "", every_s=0).due()


def test_a_fingerprint_depends_on_content_alone() -> None:
    one = fingerprint(lr=1e-3, sizes=(1, 2), where=Path("a/b"), names={"x", "y"}, dtype=torch.bfloat16, none=None)
    two = fingerprint(none=None, names={"y", "x"}, dtype="torch.bfloat16", where="a/b", sizes=[1, 2], lr=0.001)
    assert one == two and len(one) == 64
    assert one != fingerprint(
        lr=2e-3, sizes=(1, 2), where="a/b", names={"x", "y"}, dtype="torch.bfloat16", none=None
    )
    assert fingerprint(a=1) != fingerprint(a=1.0) != fingerprint(a="1")
    with pytest.raises(TypeError, match="got Tensor"):
        fingerprint(mask=torch.zeros(1))
