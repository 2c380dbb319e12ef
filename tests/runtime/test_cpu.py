"""The same bits on every machine: what a process asks of the CPU before torch is loaded."""

import os
import subprocess
import sys

import pytest

from pipeline.runtime.cpu import set_up_cpu

SHOW = "import {}; import torch; print(torch.backends.cpu.get_cpu_capability())"


def capability(first: str, **env: str) -> str:
    """Ask a fresh process that imports ``first`` before torch."""
    clean = {key: value for key, value in os.environ.items() if key != "ATEN_CPU_CAPABILITY"}
    command = [sys.executable, "-c", SHOW.format(first)]
    return subprocess.run(command, env=clean | env, capture_output=True, text=True, check=True).stdout.strip()


def test_stages_compute_in_avx2_and_the_library_alone_as_the_machine_can() -> None:
    widest = capability("pipeline")
    if widest not in ("AVX2", "AVX512"):
        pytest.skip(f"the machine computes in {widest}")
    assert capability("stages") == "AVX2"
    assert capability("stages", ATEN_CPU_CAPABILITY="default") == "DEFAULT"


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"GOMP_SPINCOUNT": "7"})
    set_up_cpu()
    assert os.environ["GOMP_SPINCOUNT"] == "7"


def test_a_machine_without_avx2_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    monkeypatch.setattr(os, "environ", {})
    set_up_cpu()
    assert set(os.environ) == {"GOMP_SPINCOUNT"}
