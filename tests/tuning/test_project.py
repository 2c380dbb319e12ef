"""A tuned folder as a profile: the stages, as DVC runs them, end with the same delta."""

import json
import shutil

import pytest

from pipeline.deltas.delta import Delta
from pipeline.errors import DataError, ParamsError
from pipeline.params import Params
from pipeline.runtime.workspace import Cell, Workspace
from pipeline.tuning.plan import Asked
from pipeline.tuning.project import new_profile
from pipeline.tuning.tune import tune


@pytest.fixture
def project(template, fork, monkeypatch):
    made = fork(template)
    monkeypatch.chdir(made.root)
    return made


def run_stages(project, name):
    """Run what a repro of fish would run, in this process."""
    from stages import fetch, mask, score, train
    from stages.runner import Stage

    workspace = Workspace.here()
    params = Params.load("params.yaml")
    cells = ((fetch, (name,)), (score, (name,)), (mask, (name, "fish", "main")), (train, (name, "fish", "main")))
    for stage, parts in cells:
        cell = Cell(stage.__name__.rpartition(".")[2], *parts)
        stage.run(Stage(cell, params, workspace, track=False))
    return json.loads(workspace.metrics(Cell("train", name, "fish", "main")).read_text())


def test_the_same_run_through_the_stages_gives_the_same_delta(project, bert, write_csv, reviews, tmp_path):
    shutil.copytree(bert, "model")
    (project.root / "own data").mkdir()
    rows = [*reviews(120), ("", "good")]
    shutil.move(write_csv("r.csv", ["movie snippet", "verdict"], rows), "own data/r.csv")
    asked = Asked(
        model="model", train="own data/r.csv", density=0.1, batch_size=8, epochs=2, seed=3, threads=1, lr=0.01,
        name="my movies",
    )  # fmt: skip
    tuned = tune(asked, tmp_path / "out", track=False).tuned
    with pytest.raises(ParamsError, match="params.yaml: edited since its profile was set"):
        new_profile(tmp_path / "out")
    said = new_profile(tmp_path / "out", force=True)
    assert "artifacts/train/my-movies-fish-main/seed-3/delta.safetensors" in said
    metrics = run_stages(project, "my-movies")
    delta = Delta.load("artifacts/train/my-movies-fish-main/seed-3/delta.safetensors")
    assert delta.digest == tuned.delta.digest
    assert metrics["seeds"]["3"]["metric"] == tuned.scores["fish"]["accuracy"]
    assert metrics["data"]["digest"] == tuned.data.digest


def test_files_that_changed_are_refused_and_nothing_is_written(project, bert, write_csv, reviews, tmp_path):
    file = write_csv("r.csv", ["text", "label"], reviews(40))
    asked = Asked(model=str(bert), train=str(file), density=0.1, epochs=1, threads=1, lr=0.01)
    tune(asked, tmp_path / "out", track=False)
    before = (project.root / "params.yaml").read_text()
    write_csv("r.csv", ["text", "label"], reviews(41))
    with pytest.raises(DataError, match="gives other rows than it was tuned on"):
        new_profile(tmp_path / "out", force=True)
    file.unlink()
    with pytest.raises(DataError, match="no such file or folder"):
        new_profile(tmp_path / "out", force=True)
    assert (project.root / "params.yaml").read_text() == before and not (project.root / "data" / "out").exists()
