"""Verification of a real DVC project: every kind of fault is told apart, and doing what the line says mends it."""

import json
import os
import re
import shlex
import shutil
import sys

import pytest
import torch
from safetensors.torch import save_file

from pipeline.artifacts import dvc_lock, verification
from pipeline.errors import ArtifactError, ParamsError
from pipeline.files import write_file
from pipeline.masks.mask import Mask

MASK = "artifacts/mask/reviews-fish-main/seed-0/mask.safetensors"
OTHER = "artifacts/mask/reviews-random-main/seed-0/mask.safetensors"
OUT, STAGE = "artifacts/mask/reviews-fish-main", "mask-ranked@reviews-fish-main"
METRICS = "metrics/mask/reviews-fish-main.json"


@pytest.fixture
def project(finished, fork, monkeypatch):
    project = fork(finished)
    monkeypatch.chdir(project.root)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    return project


@pytest.fixture
def verify(capsys):
    """Verify and parse the report.

    Returns:
        A function from paths to (rows that are not ok, the report, the message raised or None).
    """

    def verify(*paths):
        message = None
        capsys.readouterr()
        try:
            verification.verify(list(paths), as_json=True)
        except ArtifactError as error:
            message = str(error)
        report = json.loads(capsys.readouterr().out)
        for state in ("ok", "missing", "changed", "damaged", "foreign"):
            assert report[state] == sum(row["state"] == state for row in report["files"])
        return [row for row in report["files"] if not row["ok"]], report, message

    return verify


def flip(file):
    """Flip a bit and leave no trace in size, time or permissions, as a failing disk does."""
    before = file.stat()
    file.chmod(0o644)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)
    file.chmod(before.st_mode)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def stored(root, file):
    return dvc_lock.object_file(root / ".dvc/cache/files/md5", dvc_lock.md5_of(root / file))


def listed(root, path):
    (out,) = (out for out in dvc_lock.locked_outs(root) if out.path == path)
    return dvc_lock.object_file(root / ".dvc/cache/files/md5", out.md5)


def mend(project, todo):
    """Do what the line says: its first way, in a shell."""
    commands = re.findall(r"`([^`]+)`", re.split(r"` or `|, or `", todo)[0] + "`")
    for command in commands:
        name, *arguments = shlex.split(command)
        if name == "dvc":
            project.dvc(*arguments)
        else:
            project.run(name, *arguments)


def test_a_finished_project_is_sound_to_the_last_file(project, verify):
    bad, report, message = verify()
    assert (bad, message) == ([], None)
    rows = report["files"]
    here = {row["file"] for row in rows if row["place"] == "workspace"}
    metrics = {str(f.relative_to(project.root)) for f in (project.root / "metrics").rglob("*.json")}
    reports = {f"reports/{name}" for name in dvc_lock.files_below(project.root / "reports")}
    assert here == {f"artifacts/{name}" for name in project.artifacts()} | metrics | reports
    objects = {
        str(f.relative_to(project.root)) for f in (project.root / ".dvc/cache/files/md5").rglob("*") if f.is_file()
    }
    assert {row["file"] for row in rows if row["place"] == "cache"} == objects
    digests = {row["file"]: row["digest"] for row in rows}
    assert digests[MASK] == Mask.load(MASK).digest
    assert {row["stage"] for row in rows if row["file"] in (MASK, METRICS)} == {STAGE}


FAULTS = {
    "a bit of a mask flips": (lambda root: flip(root / MASK), MASK, "damaged"),
    "a bit of a metric flips": (lambda root: flip(root / METRICS), METRICS, "changed"),
    "a mask is deleted": (lambda root: (root / MASK).unlink(), MASK, "missing"),
    "another mask is put there": (lambda root: shutil.copyfile(root / OTHER, root / MASK), MASK, "changed"),
    "a folder is deleted": (lambda root: shutil.rmtree(root / OUT), OUT, "missing"),
    "a file is added": (lambda root: (root / OUT / "more.txt").write_text("more"), f"{OUT}/more.txt", "changed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_workspace_is_named_and_mended(project, verify, fault):
    make, file, state = FAULTS[fault]
    before = project.artifacts()
    make(project.root)
    (row,), report, message = verify()
    assert (row["file"], row["state"], row["place"], row["stage"]) == (file, state, "workspace", STAGE)
    assert f"1 {state}" in message and file in message
    mend(project, row["todo"])
    assert verify()[0] == []
    assert project.artifacts() == before


@pytest.mark.parametrize("part", ["file", "list"])
@pytest.mark.parametrize("state", ["damaged", "missing"])
def test_a_fault_in_the_cache_is_named_and_mended(project, verify, part, state):
    file = stored(project.root, MASK) if part == "file" else listed(project.root, OUT)
    if state == "damaged":
        flip(file)
        if part == "file":
            project.dvc("checkout", OUT)  # DVC 3.67 takes the object at its name
    else:
        file.unlink()
    (row,), _, message = verify()
    assert (row["file"], row["state"]) == (str(file.relative_to(project.root)), state)
    assert (row["place"], row["stage"]) == ("cache", STAGE) and OUT in row["reason"] and message
    mend(project, row["todo"])
    assert verify()[0] == []


def test_where_both_copies_are_lost_the_stage_makes_them_again(project, verify):
    before = project.artifacts()
    objects = [stored(project.root, MASK), listed(project.root, OUT)]
    for file in [*objects, project.root / MASK]:
        flip(file)
    bad, _, _ = verify()
    assert {(row["file"], row["state"]) for row in bad if row["place"] == "workspace"} == {
        (OUT, "changed"), (MASK, "damaged"),
    }  # fmt: skip
    kept = {row["file"]: row["todo"] for row in bad if row["place"] == "cache"}
    assert set(kept) == {str(file.relative_to(project.root)) for file in objects}
    assert all(f"`rm -f {file}`" in todo for file, todo in kept.items())
    assert all(f"`dvc repro {STAGE}`" in row["todo"] for row in bad if row["stage"])
    for file in (*objects, project.root / MASK):
        file.unlink()
    project.dvc("repro", STAGE)
    assert verify()[0] == []
    assert project.artifacts() == before


def test_what_other_commits_left_in_the_cache_is_verified_too(project, verify):
    cache = project.root / ".dvc/cache/files/md5"
    old = dvc_lock.object_file(cache, dvc_lock.md5_of(project.root / "params.yaml"))
    old.parent.mkdir(exist_ok=True)
    shutil.copyfile("params.yaml", old)
    assert verify()[0] == []
    flip(old)
    (row,), _, _ = verify()
    assert (row["file"], row["state"], row["stage"]) == (str(old.relative_to(project.root)), "damaged", None)


def test_a_clone_without_data_is_told_to_pull(project, verify):
    shutil.rmtree(project.root / ".dvc" / "cache")
    shutil.rmtree(project.root / "artifacts")
    bad, report, _ = verify()
    assert {row["state"] for row in bad} == {"missing"}
    row = next(row for row in bad if row["file"] == OUT)
    assert "dvc pull" in row["todo"] and STAGE in row["todo"]
    assert any(row["file"] == METRICS and row["ok"] for row in report["files"])


def test_the_cache_is_where_the_configuration_says(project, verify, tmp_path):
    shutil.move(project.root / ".dvc/cache", tmp_path / "elsewhere")
    project.dvc("cache", "dir", "--local", str(tmp_path / "elsewhere"))
    file = dvc_lock.object_file(tmp_path / "elsewhere/files/md5", dvc_lock.md5_of(project.root / MASK))
    assert verify()[0] == []
    flip(file)
    (row,), _, _ = verify()
    assert (row["file"], row["state"], row["place"]) == (str(file), "damaged", "cache")


def test_the_hash_of_a_folder_is_dvcs(project):
    for out in dvc_lock.locked_outs(project.root):
        if out.is_folder:
            found = dvc_lock.files_below(project.root / out.path)
            hashes = {name: dvc_lock.md5_of(file) for name, file in found.items()}
            assert dvc_lock.folder_md5(hashes) == out.md5
            assert dvc_lock.listed_files(listed(project.root, out.path).read_bytes()) == hashes


def test_it_works_below_the_root_and_prints_a_line_an_out_or_fault(project, monkeypatch, capsys):
    flip(project.root / MASK)
    monkeypatch.chdir(project.root / "metrics")
    with pytest.raises(ArtifactError, match="1 damaged"):
        verification.verify([], as_json=False)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    outs = len(dvc_lock.locked_outs(project.root))
    assert len(lines) == outs + 1 and "more files in the cache" in lines[-1]
    (line,) = (line for line in lines if not line.startswith("ok "))
    assert line.startswith(f"DAMAGED  ../{MASK}: section '")
    assert f"`dvc checkout --force ../{OUT}`" in line
    assert err.endswith(f"verify: {outs}/{outs} outs\n") and "\x1b" not in out + err


@pytest.mark.parametrize("text", ["stages: [1, 2]\n", "outs: {}\n", "stages:\n  a:\n    outs:\n    - path: b\n"])
def test_a_lock_of_another_kind_is_refused(tmp_path, text):
    (tmp_path / "dvc.lock").write_text(text)
    with pytest.raises(ParamsError, match=r"dvc\.lock: is no lock"):
        dvc_lock.locked_outs(tmp_path)


def test_outs_that_git_keeps_are_known_by_dvc_yaml(tmp_path):
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  a:\n    foreach: [1]\n    do:\n      cmd: x\n      outs: [kept]\n"
        "      metrics: ['m.${item}/x.json': {cache: false}, n.json]\n"
    )
    outs = "".join(
        f"    - {{path: {path}, md5: {'0' * 32}}}\n" for path in ("kept", "m.1/x.json", "m/x.json", "n.json")
    )
    (tmp_path / "dvc.lock").write_text(f"stages:\n  a@1:\n    outs:\n{outs}")
    assert [out.cached for out in dvc_lock.locked_outs(tmp_path)] == [True, False, True, True]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A mask, two shards of another program's, and a folder in between."""
    monkeypatch.chdir(tmp_path)
    mask = Mask.from_bool({"a": torch.tensor([True, False]), "b": torch.ones(300, dtype=torch.bool)})
    (tmp_path / "all" / "model").mkdir(parents=True)
    mask.save("all/mask.safetensors")
    for i in (1, 2):
        save_file({f"w{i}": torch.zeros(3)}, f"all/model/model-0000{i}-of-00002.safetensors", {"format": "pt"})
    return tmp_path / "all"


def test_foreign_files_in_a_folder_are_named_and_not_called_sound(folder, verify, capsys):
    bad, report, message = verify(folder)
    assert message is None and report["ok"] == 1 and report["foreign"] == 2
    assert all("not one written by fishmask" in row["reason"] and row["digest"] is None for row in bad)
    verification.verify([folder], as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok", "FOREIGN", "FOREIGN"]


def test_where_nothing_can_be_verified_that_is_the_error(folder, verify):
    assert "2 of another program" in verify(folder / "model")[2]
    assert "holds no file written by fishmask" in verify(next((folder / "model").iterdir()))[2]
    with pytest.raises(ArtifactError, match="no such file"):
        verification.verify([folder / "none"], as_json=True)


def test_other_formats_of_fishmask_are_verified_by_their_checksums(folder, verify):
    write_file(
        folder / "state.safetensors", format="fishmask-state", version=7, meta={}, sections={"s": torch.ones(9)}
    )
    assert verify(folder / "state.safetensors")[1]["ok"] == 1
    flip(folder / "state.safetensors")
    bad, _, message = verify(folder)
    assert "1 damaged" in message
    assert [row["file"] for row in bad if row["state"] == "damaged"] == [str(folder / "state.safetensors")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_cannot_be_read_stops_nothing(folder, verify):
    (folder / "mask.safetensors").chmod(0)
    assert "Permission" in verify(folder)[0][0]["reason"]


def test_without_a_lock_the_artifacts_are_verified(folder, verify):
    root = folder.parent
    (root / "params.yaml").write_text("profile: test\n")
    shutil.move(folder, root / "artifacts")
    assert verify()[1]["ok"] == 1


def test_verifying_does_not_load_dvc_beyond_its_configuration(project):
    code = (
        "import sys; from pathlib import Path; from pipeline.artifacts import dvc_lock; r = Path('.').absolute()\n"
        "dvc_lock.locked_outs(r); dvc_lock.cache_folder(r); print('dvc.repo' in sys.modules)"
    )
    assert project.run(sys.executable, "-c", code).stdout == "False\n"
