"""Tracking on a real sqlite store: who finds which run, what is written once, and what no failure may cost."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import pytest
from matplotlib.figure import Figure

from pipeline.errors import Interrupted, ParamsError, StorageError
from pipeline.runtime.mlflow_store import connect, ui
from pipeline.runtime.provenance import dvc_tags, git_tags
from pipeline.tracking import Tracker, project_root, runs_of, tracking_uri

REPOSITORY = Path(__file__).parent.parent
WORKER = """
import sys, time
from pipeline.runtime.process import interruptible
from pipeline.tracking import Tracker

cell = Tracker.open("exp").cell("train", "c", params={"lr": 1}, tags={}, fingerprint=sys.argv[1])
with interruptible(), cell as run:
    with run.child("seed-0", tags={"seed": 0}, fingerprint="f0") as child:
        for step in range(1, 8):
            child.log({"loss": 1 / step}, step)
        child._flush()
        print("logged", flush=True)
        if "wait" in sys.argv:
            time.sleep(60)
"""


@pytest.fixture(scope="module")
def fresh_store(tmp_path_factory):
    """A database that is set up once; setting one up takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        connect("Default")
    return folder / "mlflow.db"


@pytest.fixture
def project(tmp_path, monkeypatch, fresh_store):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("profile: demo\n")
    shutil.copy(fresh_store, tmp_path / "mlflow.db")
    return tmp_path


def opened(fingerprint="f", cell="words-fish-main", params=None, **tags):
    return Tracker.open("exp").cell("train", cell, params=params or {}, tags=tags, fingerprint=fingerprint)


def stored():
    """Every run of the experiment, oldest first."""
    store = connect("exp")
    return store.client.search_runs([store.experiment], order_by=["attributes.start_time ASC"], max_results=100)


def steps(run, key):
    return [(m.step, m.value) for m in connect("exp").client.get_metric_history(run.info.run_id, key)]


def start(project, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, *arguments],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_cell_and_its_seeds_carry_settings_curves_and_identity(project):
    (project / "sub").mkdir()
    os.chdir(project / "sub")  # the store is the project's, wherever the command runs
    with opened(params={"methods.fish.lr.words": 1e-3, "x@y,(z)": None}, task="words", method="fish") as run:
        with run.child(0, tags={"mask_digest": "abc"}, fingerprint="f0") as child:
            child.log({"accuracy@1": 0.25, "loss": 2.0}, 1)
            child.log({"loss": float("nan")}, 2)
        with run.child("seed-1", tags={"seed": 1}, fingerprint="f1"):
            pass
        run.log({"mean": 0.5}, 3)
    parent, first, second = stored()
    assert parent.info.run_id == run.run_id and parent.info.run_name == "train words-fish-main"
    for one in (parent, first, second):  # so that seeds compare by their settings, too
        assert one.data.params == {"methods.fish.lr.words": "0.001", "x_y__z_": "null"}
    assert {r.info.status for r in (parent, first, second)} == {"FINISHED"}
    for seed, one in enumerate((first, second)):
        expected = {"mlflow.parentRunId": run.run_id, "seed": str(seed), "task": "words", "method": "fish"}
        expected |= {"stage": "train", "cell": "words-fish-main", "fingerprint": f"f{seed}", "level": "seed"}
        assert expected.items() <= one.data.tags.items()
    assert first.data.tags["mask_digest"] == "abc"
    assert steps(first, "accuracy_1") == [(1, 0.25)]
    assert steps(first, "loss")[0] == (1, 2.0) and steps(first, "loss")[1][0] == 2
    assert steps(parent, "mean") == [(3, 0.5)]
    assert (project / "mlflow.db").is_file() and not (project / "sub" / "mlflow.db").exists()


def test_thousands_of_points_and_hundreds_of_params_arrive_complete(project):
    with opened(params={f"p{i}": i for i in range(250)}) as run:
        for step in range(1300):
            run.log({"a": step, "b": -step}, step)
    (only,) = stored()
    assert len(only.data.params) == 250
    assert sorted(steps(only, "a")) == [(i, i) for i in range(1300)]
    assert sorted(steps(only, "b")) == [(i, -i) for i in range(1300)]


def test_names_that_look_alike_once_cleaned_stay_apart(project):
    with opened(params={"a@b": 1, "a,b": 2, "../a//b/": 3}) as run:
        run.log({"m@1": 1.0, "m,1": 2.0}, 0)
    (only,) = stored()
    assert only.data.params == {"a_b": "1", "a_b-2": "2", "a/b": "3"}
    assert only.data.metrics == {"m_1": 1.0, "m_1-2": 2.0}


def test_an_interrupted_run_is_continued_without_repeating_a_step(project):
    with pytest.raises(KeyboardInterrupt), opened() as run, run.child(0, fingerprint="f0") as child:
        for step in (1, 2, 3):
            child.log({"loss": step}, step)
        raise KeyboardInterrupt
    assert {r.info.status for r in stored()} == {"KILLED"}
    with opened(params={"lr": 1}) as run, run.child(0, fingerprint="f0") as child:
        for step in (2, 3, 4):
            child.log({"loss": step}, step)
    parent, seed = stored()
    assert (parent.info.status, seed.info.status) == ("FINISHED", "FINISHED")
    assert steps(seed, "loss") == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert parent.data.tags["resumed"] == "1" and parent.data.tags["attempt"] == "1"


def test_a_finished_run_that_is_executed_again_is_another_attempt(project):
    for _ in range(2):
        with opened() as run, run.child(0, fingerprint="f0") as child:
            child.log({"loss": 1.0}, 1)
    runs = stored()
    assert sorted(r.data.tags["attempt"] for r in runs if r.data.tags["level"] == "cell") == ["1", "2"]
    assert [steps(r, "loss") for r in runs if r.data.tags["level"] == "seed"] == [[(1, 1.0)], [(1, 1.0)]]


def test_a_seed_that_had_finished_is_not_logged_twice_when_its_cell_goes_on(project):
    with pytest.raises(Interrupted), opened() as run:
        with run.child(0, fingerprint="f0") as child:
            child.log({"loss": 1.0}, 1)
        raise Interrupted("stop")
    with opened() as run, run.child(0, fingerprint="f0") as child:
        child.log({"loss": 1.0}, 1)
    runs = stored()
    assert [r.data.tags["level"] for r in runs] == ["cell", "seed"]
    assert steps(runs[1], "loss") == [(1, 1.0)]


def test_changed_settings_are_another_run_and_a_changed_value_never_raises(project, capfd):
    with pytest.raises(SystemExit), opened("f", params={"lr": 1}):
        raise SystemExit(3)
    with opened("g", params={"lr": 2}):
        pass
    with opened("f", params={"lr": 3, "epochs": 4}):
        pass
    first, second = stored()
    assert first.data.params == {"lr": "1", "epochs": "4"} and second.data.params == {"lr": "2"}
    assert first.info.status == second.info.status == "FINISHED"
    assert capfd.readouterr().err == ""


def test_an_error_ends_the_run_as_failed_with_its_first_line(project):
    with pytest.raises(ValueError, match="bad"), opened() as run:
        run.log({"loss": 1.0}, 1)
        raise ValueError("bad\nmore")
    (only,) = stored()
    assert only.info.status == "FAILED" and only.data.tags["error"] == "ValueError: bad"
    assert steps(only, "loss") == [(1, 1.0)]


def test_kill_9_then_again_is_one_run(project):
    killed = start(project, "f", "wait")
    assert killed.stdout.readline() == "logged\n"
    killed.kill()
    killed.communicate()
    assert {r.info.status for r in stored()} == {"RUNNING"}
    with opened("f", "c") as run, run.child("seed-0", fingerprint="f0") as child:
        for step in range(6, 10):
            child.log({"loss": 1 / step}, step)
    parent, seed = stored()
    assert (parent.info.status, seed.info.status) == ("FINISHED", "FINISHED")
    assert steps(seed, "loss") == [(step, 1 / step) for step in range(1, 10)]


def test_sigterm_ends_the_runs_as_killed(project):
    stopped = start(project, "f", "wait")
    assert stopped.stdout.readline() == "logged\n"
    time.sleep(0.1)
    stopped.send_signal(signal.SIGTERM)
    _, errors = stopped.communicate(timeout=30)
    assert stopped.returncode != 0 and "Interrupted" in errors
    assert [r.info.status for r in stored()] == ["KILLED", "KILLED"]


def test_several_processes_touching_a_fresh_store_at_once_all_succeed(project):
    (project / "mlflow.db").unlink()
    workers = [start(project, fingerprint) for fingerprint in ("a", "b")]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0 and errors == ""
    runs = stored()
    assert sorted(r.data.tags["fingerprint"] for r in runs) == ["a", "b", "f0", "f0"]
    assert {r.info.status for r in runs} == {"FINISHED"}
    for run in runs:
        if run.data.tags["level"] == "seed":
            assert steps(run, "loss") == [(step, 1 / step) for step in range(1, 8)]


def test_a_signal_during_a_write_is_neither_lost_nor_taken_for_a_database_error(project, capfd):
    def stop(*_):
        raise Interrupted("stop")

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(Interrupted), opened() as run:
            write = run._store.client.log_batch

            def interrupted(*arguments):
                signal.raise_signal(signal.SIGTERM)
                return write(*arguments)

            run._store.client.log_batch = interrupted
            run.log({"loss": 1.0}, 1)
            run._flush()
    finally:
        signal.signal(signal.SIGTERM, previous)
    (only,) = stored()
    assert only.info.status == "KILLED" and steps(only, "loss") == [(1, 1.0)]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:////proc/none/mlflow.db"])
def test_an_unavailable_store_costs_one_line_and_nothing_else(project, monkeypatch, capfd, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    reached = []
    with opened() as run, run.child(0, fingerprint="f0") as child:
        child.log({"loss": 1.0}, 1)
        child.figure(Figure(), "empty")
        reached.append(child.run_id)
    assert reached == [None]
    errors = capfd.readouterr().err
    assert errors.count("\n") == 1 and uri in errors and "goes on without it" in errors


def test_a_store_that_breaks_midway_is_given_up_after_three_failures(project, capfd):
    calls = []

    def broken(*_):
        calls.append(1)
        raise OSError("disk I/O error\nlong trace")

    with opened() as run:
        run._store.client.log_batch = broken
        for step in range(6):
            run.log({"loss": 1.0}, step)
            run._flush()
    assert len(calls) == 3
    assert capfd.readouterr().err.count("\n") == 1


def test_a_database_that_breaks_midway_prints_no_traceback_of_mlflows(project, capfd, caplog):
    from sqlalchemy.exc import OperationalError
    from sqlalchemy.orm import Session

    def full(*_, **__):
        raise OperationalError("INSERT", {}, Exception("database or disk is full"))

    with opened() as run, pytest.MonkeyPatch.context() as patched:
        patched.setattr(Session, "commit", full)
        for step in range(4):
            run.log({"loss": 1.0}, step)
            run._flush()
    errors = capfd.readouterr().err
    assert not caplog.records
    assert errors.count("\n") == 1 and "disk is full" in errors and "goes on without it" in errors


def test_a_passing_failure_loses_no_point(project, capfd):
    with opened() as run:
        write, failures = run._store.client.log_batch, [OSError("database is locked")] * 2

        def locked(*arguments):
            if failures:
                raise failures.pop()
            return write(*arguments)

        run._store.client.log_batch = locked
        for step in range(4):
            run.log({"loss": step}, step)
            run._flush()
    (only,) = stored()
    assert steps(only, "loss") == [(i, i) for i in range(4)]
    assert capfd.readouterr().err == ""


def test_a_disabled_tracker_records_nothing_and_opens_no_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = Tracker.open("exp", enabled=False)
    with tracker.cell("train", "c", params={}, tags={}, fingerprint="f") as run, run.child(0) as child:
        child.log({"loss": 1.0}, 1)
        child.tag(a=1)
        child.table([{"a": 1}], "t")
        assert child.run_id is None
    assert list(tmp_path.iterdir()) == []


def test_small_figures_and_tables_are_kept_with_the_project(project):
    (project / "picture.svg").write_text("<svg/>")
    with opened() as run:
        run.figure(Figure(), "curve")
        run.figure(project / "picture.svg", "picture")
        run.table([{"a": 1, "b": "x,y"}, {"a": 2, "c": 3}], "numbers")
    kept = {f.name: f for f in (project / "mlartifacts" / "exp" / run.run_id).rglob("*.*")}
    assert set(kept) == {"curve.svg", "picture.svg", "numbers.csv"}
    assert kept["numbers.csv"].read_text() == 'a,b,c\n1,"x,y",\n2,,3\n'


def test_large_or_foreign_files_are_refused(project):
    (project / "delta.safetensors").write_bytes(b"x")
    (project / "big.svg").write_bytes(b"x" * ((1 << 20) + 1))
    with opened() as run:
        for name in ("delta.safetensors", "big.svg"):
            with pytest.raises(StorageError, match="leave masks, deltas and checkpoints to DVC"):
                run.figure(project / name, name)


def test_the_root_is_the_real_project_under_dvc_and_the_users_uri_wins(project, monkeypatch):
    assert project_root() == project and tracking_uri() == f"sqlite:///{project}/mlflow.db"
    monkeypatch.setenv("DVC_ROOT", str(project / "real"))
    assert tracking_uri() == f"sqlite:///{project}/real/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking_uri() == "http://tracking:5000"


def test_runs_are_found_by_their_tags_in_every_experiment(project, capfd):
    with opened("f", "one") as first, first.child(0):
        pass
    with Tracker.open("other").cell("train", "one", params={}, tags={}, fingerprint="g") as second:
        pass
    with opened("h", "two"):
        pass
    assert runs_of(project, {"level": "cell", "cell": "one"}) == [second.run_id, first.run_id]
    assert runs_of(project / "nowhere", {"cell": "one"}) == []
    assert not (project / "nowhere").exists()
    (project / "mlflow.db").write_text("this is no database" * 100)
    shutil.copytree(project, project / "broken", ignore=shutil.ignore_patterns("broken"))
    assert runs_of(project / "broken", {"cell": "one"}) == []
    assert capfd.readouterr().err.count("\n") == 1


def test_git_tags_tell_a_dirty_tree_but_not_from_the_pipelines_own_outputs(tmp_path):
    def git(*arguments):
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *name, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    assert git_tags(tmp_path) == {}
    git("init")
    (tmp_path / "code.py").write_text("a")
    (tmp_path / "metrics").mkdir()
    assert git_tags(tmp_path) == {"git.dirty": "true"}
    git("add", ".")
    git("commit", "-m", "x")
    commit = git("rev-parse", "HEAD")
    (tmp_path / "metrics" / "a.json").write_text("{}")
    (tmp_path / "dvc.lock").write_text("{}")
    assert git_tags(tmp_path / "metrics") == {"git.commit": commit, "git.dirty": "false"}
    (tmp_path / "code.py").write_text("b")
    assert git_tags(tmp_path) == {"git.commit": commit, "git.dirty": "true"}


LOCK = """
schema: '2.0'
stages:
  fetch@words: {outs: [{path: artifacts/fetch/words, md5: new1.dir}]}
  fetch@digits: {outs: [{path: artifacts/fetch/digits, md5: other.dir}]}
  mask@words-fish-main: {outs: [{path: artifacts/mask/words-fish-main, md5: new2.dir}]}
"""
OWN = """
  train@words-fish-main:
    deps: [{path: artifacts/mask/words-fish-main, md5: old.dir}, {path: stages/train.py, md5: code}]
    outs: [{path: artifacts/train/words-fish-main, md5: mine.dir}]
"""


def test_dvc_tags_are_the_hashes_of_this_run_and_not_of_the_last(tmp_path):
    assert dvc_tags(tmp_path, "train", "words-fish-main") == {}
    (tmp_path / "dvc.lock").write_text(LOCK)
    first = {"dvc.artifacts/fetch/words": "new1.dir", "dvc.artifacts/mask/words-fish-main": "new2.dir"}
    assert dvc_tags(tmp_path, "train", "words-fish-main") == first
    (tmp_path / "dvc.lock").write_text(LOCK + OWN)
    assert dvc_tags(tmp_path, "train", "words-fish-main") == {"dvc.artifacts/mask/words-fish-main": "new2.dir"}


def test_ui_refuses_a_taken_port_and_leaves_a_remote_server_alone(project, monkeypatch, capsys):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ParamsError, match="--port"):
            ui(project, taken.getsockname()[1])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert ui(project) == 0 and "http://tracking:5000" in capsys.readouterr().out


def test_ui_says_in_one_line_that_a_store_is_broken(project):
    (project / "mlflow.db").write_text("this is no database" * 100)
    with pytest.raises(StorageError, match="cannot open the store") as caught:
        ui(project, 0)
    assert "\n" not in str(caught.value)
