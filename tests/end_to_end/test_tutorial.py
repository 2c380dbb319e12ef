"""docs/tutorial.md, followed literally in a fresh folder: every command runs, and prints what the page shows.

Numbers and digests differ from machine to machine and are compared as "a number"; a line ``...`` stands for any.
"""

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
MARK = "--- 8< ---"


def blocks():
    """Files to write, and commands with the output that the page shows for them."""
    files, commands = {}, []
    for kind, name, body in re.findall(r"^```(\w+)(?: ([\w.]+))?\n(.*?)^```$", PAGE, re.M | re.S):
        if kind == "python" and name:
            files[name] = body
        elif kind == "console":
            for line in body.splitlines():
                if line.startswith("$ "):
                    commands.append((line[2:], []))
                else:
                    commands[-1][1].append(line)
    return files, commands


def plain(line):
    """A line without what differs: numbers, digests, the frames and widths of tables."""
    line = re.sub(r"\b(?=[0-9a-f]*\d)[0-9a-f]{12,64}\b", "#", line)
    line = re.sub(r"\d[\d,.]*(e-\d+)?", "#", line)
    return " ".join(re.sub(r"[^\x00-\x7f]+|[|]", " ", line).split())


def shown(expected, printed):
    """Tell whether the page's lines are there, in order; between ``...`` they stand together."""
    lines = [text for line in printed.splitlines() if (text := plain(line))]
    parts = [
        [plain(line) for line in part.split("\n") if plain(line)] for part in "\n".join(expected).split("...")
    ]
    at = 0
    for number, part in enumerate(parts):
        starts = [at] if number == 0 else range(at, len(lines) - len(part) + 1)
        if number == len(parts) - 1 and part:
            starts = [start for start in starts if start == len(lines) - len(part)]
        found = next((start for start in starts if lines[start : start + len(part)] == part), None)
        if found is None:
            return False
        at = found + len(part)
    return at == len(lines) or (len(parts) > 1 and not parts[-1])


def test_the_comparison_can_fail():
    printed = "a 12\nprogress\nmore\ntotal 3.5 of ab12cd34ef56\n"
    assert shown(["a 7", "...", "total 1 of 000000000000"], printed)
    assert shown(["..."], printed) and shown(["a 7", "..."], printed)
    for wrong in (["b 7", "..."], ["a 7", "total 1 of 000000000000"], ["...", "more"], ["a 7"], []):
        assert not shown(wrong, printed)


@pytest.mark.timeout(1200)  # two minutes on idle cores
@pytest.mark.skipif(shutil.which("curl") is None, reason="the tutorial asks its server by curl")
def test_the_tutorial_as_it_stands(tmp_path):
    files, commands = blocks()
    assert len(commands) == 10 and list(files) == ["make_reviews.py"]
    for name, body in files.items():
        (tmp_path / name).write_text(body)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = ["set -m", "python make_reviews.py"]
    for command, _ in commands:
        script += [f"echo '{MARK}'", command.replace("5001", str(port)), 'echo "exit code $?"']
    drop = {"MLFLOW_TRACKING_URI", "DVC_ROOT", "DVC_STAGE", "FISHMASK_DATA"}
    environment = {k: v for k, v in os.environ.items() if k not in drop} | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
        "COLUMNS": "120",
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    (tmp_path / "follow.sh").write_text("\n".join([*script, f"echo '{MARK}'", "kill %1; wait"]))
    with open(tmp_path / "printed.txt", "w") as out:
        shell = subprocess.Popen(
            ["bash", "follow.sh"], cwd=tmp_path, env=environment, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            shell.wait(1100)
            assert _ended(shell.pid, 60), (tmp_path / "server.log").read_text()[-3000:]  # `kill %1` ends it all
        finally:
            _end(shell)
    printed = (tmp_path / "printed.txt").read_text()
    parts = printed.split(f"{MARK}\n")[1:-1]
    assert len(parts) == 10, printed[-3000:]
    for (command, expected), part in zip(commands, parts, strict=True):
        text, _, code = part.rpartition("exit code ")
        assert code.strip() == "0", f"{command}\n{text[-2000:]}"
        assert shown(expected, text), (
            f"{command}\n--- the page shows\n{chr(10).join(expected)}\n--- printed\n{text}"
        )
    _check_what_was_made(tmp_path, parts[-1])
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), timeout=2):
        pass


def _check_what_was_made(folder, answer):
    with open(folder / "answers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    right = sum(row["verdict"] == row["prediction"] for row in rows)
    assert len(rows) == 100 and right >= 60  # of two classes alike
    (served,) = json.loads(answer[: answer.rindex("exit code")])["predictions"]
    assert served["prediction"] == "thumbs up" and served["p_thumbs up"] > 0.5
    scores = json.loads((folder / "tuned" / "tune.json").read_text())["scores"]
    assert scores["fish"]["accuracy"] > scores["head"]["accuracy"]


def _processes(session):
    """The living processes of a session, by /proc: with job control each job leads a group of its own."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, _, _, its, *_ = path.read_text().rpartition(") ")[2].split()
            if int(its) == session and state != "Z":
                yield int(path.parent.name)


def _ended(session, seconds):
    """Wait until a session has no process: a server's worker outlives by a moment the process waited for."""
    until = time.monotonic() + seconds
    while any(_processes(session)):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def _end(shell):
    """End the shell and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in _processes(shell.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        if _ended(shell.pid, 30):
            break
    shell.wait(60)
