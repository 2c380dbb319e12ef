"""What a process that computes asks of the CPU: the same bits on every machine, and cores that others can use.

Both are environment variables that torch and its libraries read when they are loaded; what the user has set stays.
"""

import os
import platform
from pathlib import Path

# Long spinning of idle OpenMP threads gains nothing here, and costs fivefold where another process wants a core:
# the thread with work waits for the one that spins (4.5 s against 0.8 s for a loop of small products, two threads,
# two busy cores). Not spinning at all makes a training step on idle cores 1.5x slower.
_PATIENCE = {"GOMP_SPINCOUNT": "5000"}  # a few microseconds

# Wider vectors sum in another order and end in other last bits. AVX2 is what every x86 server of the last ten
# years has; at the demo's sizes AVX-512 is no faster (dev/LOG.md).
_INSTRUCTIONS = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def set_up_cpu() -> None:
    """Set what is not set yet; call it before torch is imported."""
    for key, value in (_PATIENCE | (_INSTRUCTIONS if _has_avx2() else {})).items():
        os.environ.setdefault(key, value)


def _has_avx2() -> bool:
    if platform.machine() != "x86_64":
        return False
    try:
        return " avx2 " in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
