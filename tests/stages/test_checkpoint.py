"""The checkpoint stage on a user's own text task: what it writes, reads and says; killed, it goes on."""

import json
import re
import shutil

import pytest

from pipeline.deltas.chain import Chain
from pipeline.errors import ParamsError
from pipeline.params import Params
from pipeline.runtime.workspace import Cell, Workspace
from stages import checkpoint, fetch
from stages.runner import Stage

SETTINGS = """\
checkpoints:
  fixed: {epochs: 2}
  often: {density: 0.1, every: 1, epochs: 2, examples: 32, lr: {fish: 0.02}}
  leak: {epochs: 2, weight_decay: 0.5, weight_decay_scope: all}
methods:
"""
NO_GRID = "  checkpoint: {tasks: [], methods: [], settings: [],"
GRID = "  checkpoint: {tasks: [reviews], methods: [fish, random], settings: [fixed, often],"


@pytest.fixture
def project(template, tmp_path, monkeypatch):
    root = tmp_path / "project"
    shutil.copytree(template, root, symlinks=True)
    monkeypatch.chdir(root)
    file = root / "params.yaml"
    text = file.read_text().replace("\nmethods:\n", f"\n{SETTINGS}").replace(NO_GRID, GRID)
    file.write_text(text)
    workspace = Workspace.here()
    fetch.run(Stage(Cell("fetch", "reviews"), Params.load(file), workspace, track=False))
    return workspace


def stage(workspace, method, setting):
    params = Params.load(workspace.root / "params.yaml")
    return Stage(Cell("checkpoint", "reviews", method, setting), params, workspace, track=False)


def outputs(workspace, name):
    folder, file = workspace.root / "artifacts" / "checkpoint" / name, workspace.root / "metrics" / "checkpoint"
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}
    return found | {"metrics": (file / f"{name}.json").read_bytes()}


def test_it_writes_chains_and_reproducible_metrics(project, capsys):
    done = stage(project, "fish", "often")
    checkpoint.run(done)
    assert re.search(
        r"reviews-fish-often: 2 epochs, seeds to go: 2; about .* \(an estimate,", capsys.readouterr().err
    )
    content = json.loads(outputs(project, "reviews-fish-often")["metrics"])
    assert content["lr"] == 0.02 and content["every"] == 1 and content["weight_decay_scope"] == "mask"
    for seed, values in content["seeds"].items():
        folder = project.root / "artifacts" / "checkpoint" / "reviews-fish-often" / f"seed-{seed}"
        chain = Chain.open(folder)
        chain.verify()
        assert values["density"] == pytest.approx(0.1, rel=1e-2)
        assert values["checkpoints"] == len(chain) == len(values["epochs"]) == 2
        assert values["checkpoint_bytes"] == sum(f.stat().st_size for f in folder.glob("[ms]*"))
        assert values["metric"] == values["epochs"][-1]["accuracy"] == chain.steps[-1].info["accuracy"]
        assert chain.info["seed"] == int(seed) and chain.info["task"] == "reviews"
    assert not any(word in json.dumps(content) for word in ("seconds", "peak"))
    assert not list((project.home / ".resume" / "checkpoint").glob("*/*"))
    expected = outputs(project, "reviews-fish-often")
    checkpoint.run(stage(project, "fish", "often"))
    assert outputs(project, "reviews-fish-often") == expected


def test_killed_in_the_second_seed_it_goes_on_to_the_same_bytes(project, monkeypatch):
    checkpoint.run(stage(project, "random", "often"))
    expected = outputs(project, "reviews-random-often")
    append, calls = Chain.append, []

    def stop(self, *arguments, **rest):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return append(self, *arguments, **rest)

    with monkeypatch.context() as patched:
        patched.setattr(Chain, "append", stop)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.run(stage(project, "random", "often"))
    calls.clear()
    monkeypatch.setattr(Chain, "append", stop)
    checkpoint.run(stage(project, "random", "often"))
    assert len(calls) == 2  # the probe's, and the second seed's last checkpoint
    assert outputs(project, "reviews-random-often") == expected


def test_it_reads_the_params_that_dvc_is_to_declare(project):
    done = stage(project, "fish", "leak")
    checkpoint.run(done)
    of_task = {f"tasks.reviews.{key}" for key in ("model", "metric", "density", "head", "score", "train")}
    common = {"seeds", "threads", "device", "precision", "checkpoints.leak", "methods.fish.lr.reviews"}
    assert set(done.settings) == of_task | common
    content = json.loads(outputs(project, "reviews-fish-leak")["metrics"])
    assert content["weight_decay"] == 0.5 and content["weight_decay_scope"] == "all"
    assert all(values["epochs"][-1]["frozen_norm"] < 1 for values in content["seeds"].values())


def test_names_of_the_grid_must_be_defined(project):
    file = project.root / "params.yaml"
    file.write_text(file.read_text().replace("settings: [fixed, often]", "settings: [fixed, oftn]"))
    with pytest.raises(ParamsError, match=r"grid.checkpoint.settings: unknown 'oftn'; did you mean 'often'\?"):
        Params.load(file)


def test_what_fails_leaves_nothing_beside_the_outputs(project):
    file = project.root / "params.yaml"
    file.write_text(file.read_text().replace("often: {density: 0.1,", "often: {density: 0.0001,"))
    with pytest.raises(ParamsError, match="larger than the budget"):
        checkpoint.run(stage(project, "fish", "often"))
    assert not list((project.root / "artifacts" / "checkpoint").iterdir())
    assert not (project.root / "metrics" / "checkpoint").exists()
