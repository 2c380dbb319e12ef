"""Workers on a GPU under the project's own launcher: NCCL where each has one of its own, gloo where they share it.

That two of them equal their simulation, bit for bit, tests/distributed/test_local_sgd.py shows for both devices.
"""

import sys
from pathlib import Path

import pytest
import torch

from pipeline.distributed.collectives import Collectives

sys.path.insert(0, str(Path(__file__).parent.parent / "distributed"))
import cases  # noqa: E402
import runs  # noqa: E402
from test_rounds import ends, outcome, start  # noqa: E402

pytestmark = pytest.mark.usefixtures("repeatable")


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch, cuda):
    monkeypatch.setenv("CASES_DEVICE", "cuda")
    for module in (cases, runs):
        monkeypatch.setattr(module, "DEVICE", cuda)


@pytest.mark.parametrize("name", ["plain", "ddp"])
def test_one_worker_with_a_gpu_speaks_nccl_and_is_plain_training(name, tmp_path):
    process = start(tmp_path / "run", name, workers=1)
    errors = ends(process)
    assert process.returncode == 0, errors
    (tensors,), (told,) = outcome(tmp_path / "run", workers=1)
    assert told["backend"] == "nccl" and sum(told["bytes"].values()) == 0
    model, _, _ = runs.train(name, Collectives(), sync=False)
    assert all(torch.equal(tensor.cpu(), tensors[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["everything", "bf16", "ddp"])
def test_two_workers_that_share_a_gpu_speak_gloo_and_end_equal(name, tmp_path):
    if torch.cuda.device_count() > 1:
        pytest.skip("each worker would have a GPU of its own")
    process = start(tmp_path / "run", name)
    errors = ends(process)
    assert process.returncode == 0, errors
    tensors, told = outcome(tmp_path / "run")
    assert [t["backend"] for t in told] == ["gloo"] * 2
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    assert told[0]["bytes"] == told[1]["bytes"] and sum(told[0]["bytes"].values()) > 0
    assert told[0]["records"][-1]["step"] == runs.EPOCHS * runs.LENGTH
    assert all(bool(t.isfinite().all()) for t in tensors[0].values())
