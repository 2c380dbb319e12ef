"""A folder is replaced whole or stays as it was, whatever happens meanwhile."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.runtime import atomic_folder
from pipeline.runtime.atomic import replace_file
from pipeline.runtime.atomic_folder import copy, make, replace_folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def fill(folder: Path) -> None:
    replace_file(folder / "a", [b"new", b" bytes"])
    (folder / "inner").mkdir()
    replace_file(folder / "inner" / "b", [b"more"])


@pytest.fixture
def old(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    (folder / "stale").mkdir(parents=True)
    (folder / "a").write_bytes(b"old")
    folder.chmod(0o750)
    return folder


NEW = {"a": b"new bytes", "inner/b": b"more"}


@pytest.mark.parametrize("exchange", [True, False], ids=["at once", "in two moves"])
def test_the_new_folder_takes_the_old_ones_place_and_permissions(old, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic_folder, "_exchanged", lambda one, two: False)
    with replace_folder(old) as folder:
        assert folder.parent == old.parent and content(old) == {"a": b"old"}
        fill(folder)
    assert content(old) == NEW and not (old / "stale").exists()
    assert old.stat().st_mode & 0o777 == 0o750 and os.listdir(old.parent) == ["folder"]


def test_a_new_folder_is_made_with_those_around_it(tmp_path):
    with replace_folder(tmp_path / "x" / "y" / "folder") as folder:
        fill(folder)
    assert content(tmp_path / "x" / "y" / "folder") == NEW and os.listdir(tmp_path / "x" / "y") == ["folder"]


@pytest.mark.parametrize(
    "error", [RuntimeError("bug"), KeyboardInterrupt(), OSError(28, "No space left on device")]
)
def test_any_failure_leaves_the_old_one_alone(old, error):
    with pytest.raises(StorageError if isinstance(error, OSError) else type(error)):
        with replace_folder(old) as folder:
            fill(folder)
            raise error
    assert content(old) == {"a": b"old"} and os.listdir(old.parent) == ["folder"]


def test_a_move_that_fails_half_way_is_taken_back(old, monkeypatch):
    monkeypatch.setattr(atomic_folder, "_exchanged", lambda one, two: False)
    rename, moves = os.rename, []

    def failing(source, target):
        moves.append(target)
        if len(moves) == 2:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(atomic_folder.os, "rename", failing)
    with pytest.raises(StorageError, match="Input/output error"):
        with replace_folder(old) as folder:
            fill(folder)
    assert content(old) == {"a": b"old"} and os.listdir(old.parent) == ["folder"]


def test_everything_is_synced_before_the_move(old, monkeypatch):
    done = []
    monkeypatch.setattr(atomic_folder, "sync", lambda path: done.append(path.name))
    move = atomic_folder._exchange
    monkeypatch.setattr(atomic_folder, "_exchange", lambda one, two: (done.append("move"), move(one, two)))
    with replace_folder(old) as folder:
        fill(folder)
        (folder / "of a library").write_bytes(b"not synced by itself")
    assert sorted(done[:4]) == ["a", "b", "inner", "of a library"]
    assert done[4:] == [folder.name, "move", old.parent.name]


KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.runtime import atomic_folder
from pipeline.runtime.atomic import replace_file

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[2] == "removal":
    atomic_folder.shutil.rmtree = kill
if sys.argv[2] == "move":
    atomic_folder._exchange = kill
with atomic_folder.replace_folder(Path(sys.argv[1])) as folder:
    replace_file(folder / "a", [b"new bytes"])
    if sys.argv[2] == "filling":
        kill()
"""


@pytest.mark.parametrize(("moment", "after"), [("filling", b"old"), ("move", b"old"), ("removal", b"new bytes")])
def test_killed_it_is_the_old_one_or_the_new_one(old, moment, after):
    done = subprocess.run([sys.executable, "-c", KILLED, str(old), moment])
    assert done.returncode == -signal.SIGKILL
    assert content(old) == {"a": after}
    with replace_folder(old) as folder:  # what a killed one left behind is in nobody's way
        fill(folder)
    assert content(old) == NEW


def test_copies_and_folders_that_cannot_be_made_are_one_line(old, tmp_path, monkeypatch):
    copy(old, tmp_path / "other")
    copy(old / "a", tmp_path / "other" / "again")
    assert content(tmp_path / "other") == {"a": b"old", "again": b"old"}
    assert make(tmp_path / "x" / "y") == make(tmp_path / "x" / "y") and (tmp_path / "x" / "y").is_dir()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    monkeypatch.setattr("shutil.copy2", full)
    monkeypatch.setattr("os.mkdir", lambda path, *rest: full() if path == tmp_path / "z" else None)
    for work in (
        lambda: copy(old, tmp_path / "other"), lambda: copy(old / "a", tmp_path / "b"),
        lambda: make(tmp_path / "z"),
    ):  # fmt: skip
        with pytest.raises(StorageError, match="cannot be written: .*No space left on device.*; free some space"):
            work()
