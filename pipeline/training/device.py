"""Where to compute and in which precision, with the reason; and what it cost in memory."""

import sys
from dataclasses import dataclass

import torch

from pipeline.errors import ParamsError

try:
    import resource
except ImportError:  # the standard library has it on POSIX systems only
    resource = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Device:
    """A chosen device.

    Attributes:
        device: where the model and its batches go.
        autocast: the dtype for ``torch.autocast``; None for full precision.
        reason: one line for the user, such as ``cpu: no CUDA device; fp32: autocast does not pay here``.
    """

    device: torch.device
    autocast: torch.dtype | None
    reason: str


def available() -> list[str]:
    """List the kinds of device this machine has, best first.

    Returns:
        Some of ``cuda``, ``mps`` and always ``cpu``.
    """
    kinds = ["cuda"] if torch.cuda.is_available() else []
    if torch.backends.mps.is_available():
        kinds.append("mps")
    return [*kinds, "cpu"]


def choose_device(device: str = "auto", precision: str = "auto") -> Device:
    """Choose where to compute: CUDA, then MPS, then CPU; bf16 autocast where it pays.

    Args:
        device: ``auto``, or what is wanted: ``cuda``, ``cuda:1``, ``mps``, ``cpu``.
        precision: ``auto`` (bf16 autocast on a CUDA device that computes in bf16, else fp32), ``fp32`` or
            ``bf16``. Weights and the trained vector stay as they are under autocast.

    Returns:
        The device, the autocast dtype, and the reason for both.

    Raises:
        ParamsError: if the device or precision is unknown, or asked for and not there; says what is there.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise ParamsError(f"precision '{precision}' is unknown; choose auto, fp32 or bf16")
    chosen, why = _choose(device)
    native = _computes_in_bf16(chosen)
    if precision == "bf16" and chosen.type == "cuda" and not native:
        raise ParamsError(f"precision: bf16 was asked for, but {why} does not compute in bf16; use auto or fp32")
    if precision == "fp32":
        return Device(chosen, None, f"{why}; fp32 as asked")
    if precision == "bf16":
        return Device(chosen, torch.bfloat16, f"{why}; bf16 autocast as asked")
    if native:
        return Device(chosen, torch.bfloat16, f"{why}, bf16 supported -> bf16 autocast")
    because = "no bf16 units" if chosen.type == "cuda" else "autocast does not pay here"
    return Device(chosen, None, f"{why}; fp32: {because}")


def _choose(wanted: str) -> tuple[torch.device, str]:
    """Find the device and say which it is."""
    there = available()
    if wanted == "auto":
        kind = there[0]
        if kind == "cpu":
            return torch.device("cpu"), "cpu: no CUDA device"
        chosen = torch.device(kind)
    else:
        try:
            chosen = torch.device(wanted)
        except RuntimeError:
            chosen = torch.device("meta")
        if chosen.type not in ("cuda", "mps", "cpu"):
            raise ParamsError(f"device '{wanted}' is unknown; choose auto, {', '.join(there)}")
        if chosen.type not in there:
            raise ParamsError(f"device '{wanted}' is not on this machine; it has {', '.join(there)}")
        if chosen.type == "cpu":
            return torch.device("cpu"), "cpu: as asked"
    if chosen.type == "mps":
        return chosen, "mps: Apple GPU"
    count = torch.cuda.device_count()
    if (chosen.index or 0) >= count:
        raise ParamsError(f"device '{wanted}' is not on this machine; it has cuda:0 to cuda:{count - 1}")
    return chosen, f"{chosen}: {torch.cuda.get_device_name(chosen)}"


def _computes_in_bf16(device: torch.device) -> bool:
    """Tell whether a CUDA device has bf16 units; emulated bf16 is slower than fp32."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of ``peak_memory_bytes``, where the device can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Measure the most memory in use so far.

    Returns:
        CUDA: the most bytes that tensors took since ``reset_peak_memory``. MPS: the bytes the driver holds now.
        CPU: the peak resident size of the whole process since it started; 0 where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kibibytes, except on macOS
