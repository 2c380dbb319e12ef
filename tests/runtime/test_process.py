"""A stage as a process: alone on its cell, gone with its parent, stopped cleanly."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pipeline.errors import BusyError, Interrupted, StorageError
from pipeline.runtime.process import alone, interruptible


def start(code, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


HOLD = """
    import sys, time
    from pathlib import Path
    from pipeline.runtime.process import alone
    with alone(Path(sys.argv[1]), "train words"):
        print("held", flush=True)
        time.sleep(60)
"""


def test_a_second_process_is_refused_and_names_the_first(tmp_path):
    first = start(HOLD, tmp_path / "a.lock")
    try:
        assert first.stdout.readline() == "held\n"
        with (
            pytest.raises(BusyError, match=f"train words: process {first.pid} "),
            alone(tmp_path / "a.lock", "train words"),
        ):
            pass
    finally:
        first.kill()
        first.communicate()
    with alone(tmp_path / "a.lock", "train words"):
        assert (tmp_path / "a.lock").read_text() == str(os.getpid())


def test_sigterm_becomes_an_expected_failure_and_the_handler_is_restored():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="run the same command again"), interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("shell", [False, True])
def test_a_stage_ends_when_its_parent_is_killed(shell):
    child = "import time; from pipeline.runtime.process import end_with_parent; end_with_parent(); "
    child += "print('up', flush=True); time.sleep(60)"
    parent = f"""
        import subprocess, sys
        command = [sys.executable, "-c", {child!r}]
        if {shell}:
            command = ["sh", "-c", '"$0" "$@"; true', *command]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        worker.stdout.readline()
        print(worker.pid, flush=True)
        worker.wait()
    """
    process = start(parent)
    worker = int(process.stdout.readline())
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(worker)


def alive(pid):
    """Whether the process or, for a shell, a child of it still runs."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if (int(entry) == pid or int(fields[1]) == pid) and fields[0] != "Z":
                return True
    return False


def test_a_lock_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(StorageError, match="a.lock: cannot be written: No space left"):
            alone(tmp_path / "a.lock", "train words").__enter__()
    with alone(tmp_path / "a.lock", "train words"):  # and it was let go
        pass
