"""The warm process: a stage handed over behaves as one that was started."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.runtime.warm import SOCKET, warm_process

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder with a package whose module does as it is told, behind the same door as the stages."""
    root = tmp_path_factory.mktemp("package")
    folder = root / "stages"
    folder.mkdir()
    (folder / "__init__.py").write_text("from pipeline.runtime.warm import hand_over\nhand_over()\n")
    (folder / "probe.py").write_text(
        "import os, sys, time\n"
        "what = sys.argv[1]\n"
        "print(what, os.getcwd(), os.environ.get('MARK'), 'torch' in sys.modules, flush=True)\n"
        "print('to stderr', file=sys.stderr)\n"
        "if what == 'fail': raise SystemExit(5)\n"
        "if what == 'crash': raise RuntimeError('boom')\n"
        "if what == 'die': os.kill(os.getpid(), 9)\n"
        "if what == 'wait':\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    return root


@pytest.fixture(scope="module")
def warm(package):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.chdir(package)
        with warm_process() as environment:
            yield environment


def start(package, warm, what):
    environment = os.environ | warm | {"MARK": "seen", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "stages.probe", what],
        cwd=package, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(("what", "code"), [("work", 0), ("fail", 5), ("crash", 1), ("die", 1)])
def test_output_folder_environment_and_exit_code_are_its_own(warm, package, what, code):
    process = start(package, warm, what)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code
    assert out == f"{what} {package} seen True\n"
    assert ("boom" in err) == (what == "crash")
    assert "to stderr" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_fork_ends_with_the_process_that_asked(warm, package, number):
    process = start(package, warm, "wait")
    process.stdout.readline()
    fork = int(process.stdout.readline())
    os.kill(fork, 0)
    process.send_signal(number)
    process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.kill(fork, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the fork outlived the process that asked")


def test_without_a_listener_the_stage_runs_by_itself(package):
    process = start(package, {SOCKET: str(package / "nobody")}, "work")
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, f"work {package} seen False\n")
