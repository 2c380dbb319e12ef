"""The choice of device and precision, on imagined machines."""

import pytest
import torch

from pipeline.errors import ParamsError
from pipeline.training import device as room
from pipeline.training.device import choose_device, peak_memory_bytes


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Imagine a machine: its CUDA devices as (name, capability), and whether it has MPS."""

    def imagine(*gpus: tuple[str, tuple[int, int]], mps: bool = False) -> None:
        def at(device: torch.device) -> int:
            return torch.device(device).index or 0

        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: gpus[at(d)][0])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: gpus[at(d)][1])
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return imagine


def test_a_gpu_with_bf16_units_is_used_with_them(machine) -> None:
    machine(("NVIDIA H200", (9, 0)), mps=True)
    chosen = choose_device()
    assert (chosen.device.type, chosen.autocast) == ("cuda", torch.bfloat16)
    assert chosen.reason == "cuda: NVIDIA H200, bf16 supported -> bf16 autocast"


def test_an_old_gpu_computes_in_fp32(machine) -> None:
    machine(("Tesla T4", (7, 5)))
    chosen = choose_device()
    assert (chosen.device.type, chosen.autocast) == ("cuda", None)
    assert chosen.reason == "cuda: Tesla T4; fp32: no bf16 units"
    with pytest.raises(ParamsError, match="bf16 was asked for, but cuda: Tesla T4"):
        choose_device("cuda", "bf16")


def test_then_mps_then_the_cpu(machine) -> None:
    machine(mps=True)
    assert choose_device().reason == "mps: Apple GPU; fp32: autocast does not pay here"
    machine()
    chosen = choose_device()
    assert (chosen.device, chosen.autocast) == (torch.device("cpu"), None)
    assert chosen.reason == "cpu: no CUDA device; fp32: autocast does not pay here"


def test_what_is_asked_for_is_taken(machine) -> None:
    machine(("A", (9, 0)), ("B", (7, 0)))
    assert choose_device("cuda:1").device == torch.device("cuda:1")
    assert choose_device("cuda:1").autocast is None
    assert choose_device("cuda", "fp32").autocast is None
    assert choose_device("cpu").reason.startswith("cpu: as asked; fp32")
    assert choose_device("cpu", "bf16").autocast == torch.bfloat16


@pytest.mark.parametrize(
    ("device", "precision", "says"),
    [
        ("cuda", "auto", "'cuda' is not on this machine; it has cpu"),
        ("mps", "auto", "'mps' is not on this machine; it has cpu"),
        ("gpu", "auto", "'gpu' is unknown; choose auto, cpu"),
        ("meta", "auto", "'meta' is unknown"),
        ("cpu", "fp16", "'fp16' is unknown; choose auto, fp32 or bf16"),
    ],
)
def test_what_is_not_there_is_refused(machine, device: str, precision: str, says: str) -> None:
    machine()
    with pytest.raises(ParamsError, match=says):
        choose_device(device, precision)


def test_a_missing_card_is_refused(machine) -> None:
    machine(("A", (9, 0)))
    with pytest.raises(ParamsError, match="'cuda:3' is not on this machine; it has cuda:0 to cuda:0"):
        choose_device("cuda:3")


def test_cpu_peak_memory_is_in_bytes_and_never_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    block = torch.ones(16 << 20, dtype=torch.uint8)
    after = peak_memory_bytes(torch.device("cpu"))
    assert block.sum() and 10 << 20 < before <= after < 1 << 40
    monkeypatch.setattr(room, "resource", None)
    assert peak_memory_bytes(torch.device("cpu")) == 0
