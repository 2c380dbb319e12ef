"""Two network namespaces that stand for two machines, joined by a link of a given rate and delay.

    left (10.77.1.1) -- veth, tbf --  wire  -- veth, tbf -- right (10.77.2.1)

The rate is the kernel's token bucket (``tc ... tbf``) at both ends, one for each direction. The delay is kept by a
process in ``wire`` that holds every packet for so long and passes it on through a TUN device: netem, which would
do it, is missing from many kernels. Bytes are the interfaces' own counters. Needs root, ``ip`` and ``tc``.
"""

import contextlib
import fcntl
import os
import selectors
import shutil
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.runtime.process import end_with_parent

_TUNSETIFF, _IFF_TUN_NO_PI = 0x400454CA, 0x0001 | 0x1000
_MTU = 1500


@dataclass(frozen=True)
class End:
    """One end of a link.

    Attributes:
        namespace: its name, as ``ip netns`` knows it.
        interface: its network device.
        address: its IPv4 address.
    """

    namespace: str
    interface: str
    address: str

    def command(self, *arguments: str) -> list[str]:
        """Put a command into this namespace."""
        return ["ip", "netns", "exec", self.namespace, *arguments]

    def sent(self) -> int:
        """Bytes that left through this end so far, headers of all layers included."""
        return int(self._counter("tx_bytes"))

    def received(self) -> int:
        """Bytes that came in."""
        return int(self._counter("rx_bytes"))

    def _counter(self, name: str) -> str:
        return _run(*self.command("cat", f"/sys/class/net/{self.interface}/statistics/{name}"))


def missing() -> str:
    """Say why links cannot be made here.

    Returns:
        One line; empty where they can.
    """
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"`{tool}` is missing (package iproute2)"
    try:
        with linked():
            return ""
    except (RuntimeError, OSError) as error:
        return f"network namespaces cannot be made here: {error}"


@contextlib.contextmanager
def linked(mbit: float | None = None, delay_ms: float = 0.0) -> Iterator[tuple[End, End]]:
    """Make a link and its two namespaces, and take them away again.

    Args:
        mbit: rate of each direction, in 10^6 bit/s on the wire; None for as fast as the kernel goes.
        delay_ms: of each direction.

    Yields:
        Its ends.

    Raises:
        RuntimeError: if this process may not, or the kernel cannot.
    """
    names = [f"fm{os.getpid()}{part}" for part in ("a", "b", "w")]
    left, right = (End(name, "eth0", f"10.77.{i}.1") for i, name in enumerate(names[:2], 1))
    wire = names[2]
    process = None
    try:
        for name in names:
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        for i, end in enumerate((left, right), 1):
            inner = f"w{i}"
            _run("ip", "link", "add", "eth0", "netns", end.namespace, "type", "veth",
                 "peer", "name", inner, "netns", wire)  # fmt: skip
            for name, interface, address in (
                (end.namespace, "eth0", end.address),
                (wire, inner, f"10.77.{i}.254"),
            ):
                _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", interface)
                _run("ip", "-n", name, "link", "set", interface, "mtu", str(_MTU), "up")
            _run("ip", "-n", end.namespace, "route", "add", "default", "via", f"10.77.{i}.254")
            if mbit is not None:
                _run("tc", "-n", end.namespace, "qdisc", "add", "dev", "eth0", "root", "tbf",
                     "rate", f"{mbit}mbit", "burst", "32kbit", "latency", "1s")  # fmt: skip
        _run("ip", "netns", "exec", wire, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        if delay_ms:
            process = _delaying(wire, delay_ms)
        yield left, right
    finally:
        if process is not None:
            process.kill()
            process.communicate()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _delaying(wire: str, delay_ms: float) -> subprocess.Popen[str]:
    """Start the process that holds packets, and send the packets of both ends its way."""
    process = subprocess.Popen(
        ["ip", "netns", "exec", wire, sys.executable, "-m", "benchmarks.link", str(delay_ms)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    if process.stdout.readline() != "up\n":
        process.communicate()
        raise RuntimeError("no TUN device (/dev/net/tun)")
    _run("ip", "-n", wire, "link", "set", "hold", "mtu", str(_MTU), "up")
    _run("ip", "-n", wire, "route", "add", "default", "dev", "hold", "table", "7")
    for interface in ("w1", "w2"):  # what comes from the process itself goes by the main table, to the other end
        _run("ip", "-n", wire, "rule", "add", "iif", interface, "lookup", "7")
    return process


def _hold(delay_s: float) -> None:
    """Pass every packet on, so much later."""
    end_with_parent(grandparent=False)
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH", b"hold", _IFF_TUN_NO_PI))
    print("up", flush=True)
    held: deque[tuple[float, bytes]] = deque()
    ready = selectors.DefaultSelector()
    ready.register(tun, selectors.EVENT_READ)
    while True:
        wait = max(held[0][0] - time.monotonic(), 0) if held else None
        if ready.select(wait):
            with contextlib.suppress(BlockingIOError):
                while True:
                    packet = os.read(tun, 65536)
                    held.append((time.monotonic() + delay_s, packet))
        while held and held[0][0] <= time.monotonic():
            os.write(tun, held.popleft()[1])


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}`: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    _hold(float(sys.argv[1]) / 1e3)
