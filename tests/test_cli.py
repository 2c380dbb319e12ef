"""The command: help, single stages, artifacts; and for each kind of bad input one line and an exit code."""

import errno
import json
import os
import shutil
import sys

import pytest

from pipeline import cli
from pipeline.deltas.delta import Delta
from pipeline.masks.mask import Mask

MASK = "artifacts/mask/reviews-fish-main/seed-0/mask.safetensors"
DELTA = "artifacts/train/reviews-fish-main/seed-0/delta.safetensors"


@pytest.fixture(scope="session")
def prepared(template, tmp_path_factory):
    """The temporary project with one cell fetched, scored, masked and trained, for one seed."""
    root = tmp_path_factory.mktemp("prepared") / "project"
    shutil.copytree(template, root, symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for command in (["fetch"], ["score", "--seed", "0"], ["mask", "--seed", "0"], ["train", "--seed", "0"]):
            patch.setattr(sys, "argv", ["fishmask", *command, "--task", "reviews", "--no-mlflow"])
            cli.app(prog_name="fishmask", standalone_mode=False)
    return root


@pytest.fixture
def project(prepared, tmp_path, monkeypatch):
    root = tmp_path / "project"
    shutil.copytree(prepared, root, symlinks=True)
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command in this process.

    Returns:
        A function from arguments to (exit code, stdout, stderr).
    """

    def run(*arguments):
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["fishmask", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def fails(run):
    """Run the command and require an expected failure.

    Returns:
        A function from (exit code, arguments) to the one line on stderr.
    """

    def fails(code, *arguments):
        got, _, err = run(*arguments)
        lines = [line for line in err.splitlines() if line.startswith("fishmask: ")]
        assert got == code, err
        assert len(lines) == 1 and "Traceback" not in err
        return lines[0]

    return fails


def train(*more):
    return ("train", "--task", "reviews", "--seed", "0", "--no-mlflow", *more)


def mask(*more):
    return ("mask", "--task", "reviews", "--seed", "0", "--no-mlflow", "--out", "mine", *more)


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    for (
        name
    ) in "demo repro plan profile fetch score mask train aggregate tune-lr inspect verify apply revert".split():
        assert f" {name} " in out
    for name in "doctor ui why".split():
        assert f" {name} " in out


def test_help_imports_nothing_heavy():
    import subprocess

    heavy = ("torch", "mlflow", "transformers", "dvc")
    code = f"import sys, pipeline.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["fetch", "--task", "review"], "unknown task 'review'; did you mean 'reviews'?"),
        (["mask", "--task", "reviews", "--method", "fsh"], "unknown method 'fsh'; did you mean 'fish'?"),
        (["train", "--task", "reviews", "--method", "fsh"], "unknown method 'fsh'; did you mean 'fish'?"),
        (["mask", "--task", "reviews", "--setting", "mian"], "unknown setting 'mian'; did you mean 'main'?"),
        (
            list(mask("--density", "0")),
            "density as given in place of params.yaml's: expected greater than 0, got 0",
        ),
        (list(mask("--density", "-0.5")), "greater than 0, got -0.5"),
        (list(mask("--density", "1.5")), "less than or equal to 1, got 1.5"),
        (list(mask("--density", "0.0001")), "head"),
        (list(mask("--density", "0.9")), "keep"),
        (["mask", "--task", "reviews", "--density", "0.1"], "--out"),
        (list(mask("--set", "tasks.reviews.densty=0.1")), "did you mean 'density'?"),
        (list(mask("--set", "density")), "KEY=VALUE"),
        (["profile", "use", "dmeo"], "did you mean 'demo'?"),
        (["profile", "use", "demo"], "--force"),
        (["why", "reviews-fsh-main"], "did you mean 'reviews-fish-main'?"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_code_2(project, fails, arguments, part):
    before = (project / "params.yaml").read_text()
    assert part in fails(2, *arguments)
    assert (project / "params.yaml").read_text() == before
    assert not (project / "mine").exists()


def test_a_misspelt_key_in_params_yaml_names_its_line(project, fails):
    text = (project / "params.yaml").read_text().replace("    density: 0.05", "    densty: 0.05")
    (project / "params.yaml").write_text(text)
    row = next(i for i, line in enumerate(text.splitlines(), 1) if "densty" in line)
    said = f"params.yaml:{row}: tasks.reviews.densty: unknown key 'densty'; did you mean 'density'?"
    for command in (train(), ["plan"], ["repro"], ["demo"]):  # the latter before DVC touches an output
        assert said in fails(2, *command)


def test_outside_of_dvc_the_pipeline_says_so_in_one_line(project, fails, monkeypatch):
    shutil.rmtree(project / ".dvc")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(project.parent))
    for command in ("plan", "repro"):
        assert "DVC: you are not inside of a DVC repository" in fails(9, command)


def test_an_unknown_variant_is_told_from_a_ranking_that_is_not_made(project, fails):
    said = fails(5, "mask", "--task", "reviews", "--method", "fish-spred", "--seed", "0", "--no-mlflow")
    assert "spred-examples-64.safetensors: no such ranking" in said and "score.variants" in said


def replace(file, old, new, count=-1):
    file.write_text(file.read_text().replace(old, new, count))


DATA = {
    "missing column": (lambda f: replace(f, "text,label", "body,label", 1), "text"),
    "empty file": (lambda f: f.write_text(""), "empty"),
    "no rows": (lambda f: f.write_text("text,label\n"), "row"),
    "label missing": (lambda f: replace(f, ",positive", ",", 1), "label"),
    "no file": (lambda f: f.unlink(), "train"),
}


@pytest.mark.parametrize("case", DATA)
def test_bad_data_names_file_and_key_and_leaves_the_old_output(project, fails, case):
    spoil, part = DATA[case]
    before = (project / "artifacts/fetch/reviews/train.parquet").read_bytes()
    spoil(project / "data" / "reviews" / "train.csv")
    assert part in fails(3, "fetch", "--task", "reviews", "--no-mlflow")
    assert (project / "artifacts/fetch/reviews/train.parquet").read_bytes() == before


def test_a_label_out_of_range_is_refused(project, fails):
    for split in ("train", "validation"):
        file = project / "data" / "reviews" / f"{split}.csv"
        replace(file, "negative", "0")
        replace(file, "positive", "1")
    replace(project / "data/reviews/validation.csv", ",1\n", ",7\n", 1)
    line = fails(3, "fetch", "--task", "reviews", "--no-mlflow")
    assert "label" in line and "7" in line and "validation" in line


def test_a_missing_model_folder_is_refused(project, fails):
    shutil.move(project / "data" / "bert", project / "data" / "elsewhere")
    assert "data/bert" in fails(4, *train())


@pytest.mark.parametrize("damage", ["flip", "truncate", "foreign", "other"])
def test_a_damaged_or_foreign_mask_is_refused_and_named(project, fails, damage):
    file = project / MASK
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 16
    elif damage == "truncate":
        del data[-7:]
    elif damage == "foreign":
        data = (project / "data" / "bert" / "model.safetensors").read_bytes()
    else:
        data = (project / DELTA).read_bytes()
    file.write_bytes(data)
    before = (project / DELTA).read_bytes()
    assert "mask.safetensors" in fails(5, *train())
    assert (project / DELTA).read_bytes() == before
    if damage in ("flip", "truncate"):
        assert "mask.safetensors" in fails(5, "verify", MASK)
        assert "mask.safetensors" in fails(5, "inspect", MASK)


def test_a_full_disk_is_one_line_and_loses_nothing(project, fails, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = (project / MASK).read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    line = fails(7, "mask", "--task", "reviews", "--seed", "0", "--no-mlflow")
    assert "No space left on device" in line
    monkeypatch.undo()
    assert (project / MASK).read_bytes() == before
    assert not list(project.rglob("*.tmp"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_an_unwritable_folder_is_one_line(project, fails):
    (project / "locked").mkdir(mode=0o500)
    assert "locked" in fails(7, *mask()[:-1], "locked/mask")


def test_an_output_below_a_file_is_one_line(project, fails):
    (project / "plain").write_text("")
    assert "plain" in fails(7, "mask", "--task", "reviews", "--seed", "0", "--no-mlflow", "--out", "plain/mask")


def test_inspect_and_verify_agree_with_the_files(project, run):
    whole = Mask.load(project / MASK)
    code, out, _ = run("inspect", MASK, "--json")
    facts = json.loads(out)
    assert (code, facts["digest"], facts["coordinates"]) == (0, whole.digest, whole.nnz)
    assert sum(row["count"] for row in facts["layers"]) == whole.nnz
    code, out, _ = run("inspect", DELTA)
    assert code == 0 and "classifier.weight" in out and "█" in out
    code, out, _ = run("verify", "--json")
    report = json.loads(out)
    assert code == 0 and report["damaged"] == 0
    assert {row["digest"] for row in report["files"]} >= {whole.digest, Delta.load(project / DELTA).digest}


def test_apply_gives_the_trained_model_and_revert_the_base(project, run):
    import torch
    from safetensors.torch import load_file

    assert run("apply", DELTA, "--base", "data/bert", "--out", "tuned")[0] == 0
    tuned = load_file(project / "tuned" / "model.safetensors")
    delta = Delta.load(project / DELTA)
    for name, at in delta.mask.indices.items():
        assert torch.equal(tuned[name].reshape(-1)[at], delta.values[name]), name
    assert run("revert", DELTA, "tuned", "--base", "data/bert", "--out", "again")[0] == 0
    base, again = (
        load_file(project / "data/bert/model.safetensors"),
        load_file(project / "again/model.safetensors"),
    )
    for name, tensor in base.items():
        assert torch.equal(again[f"bert.{name}"], tensor), name
    assert any(not torch.equal(tuned[f"bert.{name}"], tensor) for name, tensor in base.items())


def test_a_wrong_base_is_refused_and_nothing_is_written(project, fails):
    from safetensors.torch import load_file, save_file

    file = project / "data/bert/model.safetensors"
    tensors = load_file(file)
    tensors["embeddings.LayerNorm.weight"][0] += 1
    save_file(tensors, file, {"format": "pt"})
    assert "base" in fails(6, "apply", DELTA, "--base", "data/bert", "--out", "tuned")
    assert not (project / "tuned").exists()


def test_revert_without_base_values_asks_for_the_base(project, run, fails):
    assert run("apply", DELTA, "--base", "data/bert", "--out", "tuned")[0] == 0
    assert "--base" in fails(2, "revert", DELTA, "tuned", "--out", "again")


def test_outside_a_project_the_line_says_where_to_go(tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    assert "params.yaml: not found" in fails(2, "score", "--task", "reviews")


def test_doctor_and_profiles_answer_in_json(project, run):
    code, out, _ = run("doctor", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["device"].startswith("cpu") and facts["profile"] == "test"
    code, out, _ = run("profile", "list", "--json")
    assert code == 0 and "demo" in json.loads(out)["profiles"]


def test_why_traces_a_number_to_its_files(project, run):
    code, out, _ = run("why", "reviews-fish-main", "--json")
    facts, metrics = json.loads(out), json.loads((project / "metrics/train/reviews-fish-main.json").read_text())
    assert code == 0 and facts["mean"] == metrics["seeds"]["0"]["metric"]
    assert facts["masks"] == {"0": Mask.load(MASK).digest} and facts["deltas"] == {"0": Delta.load(DELTA).digest}
    lines = run("why", "reviews-fish-main")[1].splitlines()
    assert "masks" in lines and f"  0  {facts['masks']['0']}" in lines and "commit    not committed" in lines


def test_profile_use_replaces_params_only_when_nothing_is_lost(project, run):
    assert run("profile", "use", "demo", "--force")[0] == 0
    assert (project / "params.yaml").read_text() == run("profile", "show", "demo")[1]
    assert run("profile", "use", "demo")[0] == 0
