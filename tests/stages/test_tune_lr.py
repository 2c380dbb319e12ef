"""The search of learning rates: the reported split stays unread, whatever the method, and only rates change."""

import json
import shutil

import pytest

from pipeline.params import Params
from pipeline.runtime.workspace import Cell, Workspace
from stages.tune_lr import tune


@pytest.fixture
def project(template, tmp_path, monkeypatch):
    from stages import fetch
    from stages.runner import Stage

    root = tmp_path / "project"
    shutil.copytree(template, root, symlinks=True)
    monkeypatch.chdir(root)
    workspace = Workspace.here()
    fetch.run(Stage(Cell("fetch", "reviews"), Params.load(root / "params.yaml"), workspace, track=False))
    return workspace


def project_rows(project):
    manifest = json.loads((project.root / "artifacts" / "fetch" / "reviews" / "manifest.json").read_text())
    return manifest["splits"]["train"]["rows"]


def test_the_reported_split_is_never_read_and_only_rates_change(project):
    (project.root / "artifacts" / "fetch" / "reviews" / "validation.parquet").unlink()
    file = project.root / "params.yaml"
    before = file.read_text()
    best = tune(project, Params.load(file), "reviews", ["fish"], 2, write=True, reach=1)
    found = json.loads((project.root / "metrics" / "tune-lr" / "reviews.json").read_text())
    tried = found["methods"]["fish"]["tried"]
    assert found["rows"]["fit"] + found["rows"]["tune"] == project_rows(project)
    assert len(tried) >= 3 and sorted(map(len, tried.values()))[-2:] == [2, 2]
    assert len(tried[f"{best['fish']:g}"]) == 2
    after = Params.load(file)
    assert after.methods["fish"].lr["reviews"] == best["fish"]
    assert Params.load(file, {"methods.fish.lr.reviews": 0.01}) == Params.load(
        project.root / "params.yaml", {"methods.fish.lr.reviews": 0.01}
    )
    changed = [line for line in file.read_text().splitlines() if line not in before.splitlines()]
    assert all("fish: {lr:" in line for line in changed)
    assert len(file.read_text().splitlines()) == len(before.splitlines())


@pytest.mark.parametrize("method", ["lora", "shira", "deviation", "fish-layer"])
def test_every_kind_of_method_is_tuned_on_train_alone(project, method):
    (project.root / "artifacts" / "fetch" / "reviews" / "validation.parquet").unlink()
    overrides = {"tasks.reviews.density": 0.2, "tasks.reviews.train.epochs": 1}
    overrides |= {f"methods.{method}": {"lr": {"reviews": 1e-3}}, "methods.dense": {"lr": {"reviews": 1e-3}}}
    overrides |= {"tasks.reviews.score.variants": {"layer": {"selection": "per-layer"}}}
    params = Params.load(project.root / "params.yaml", overrides)
    assert set(tune(project, params, "reviews", [method], 1, write=False, reach=0)) == {method}


def test_a_setting_has_rates_of_its_own(project):
    file = project.root / "params.yaml"
    text = file.read_text().replace("denser: {density: 0.2", "denser: {lr: {reviews: {fish: 0.02}}, density: 0.2")
    assert text != file.read_text()
    file.write_text(text)
    best = tune(project, Params.load(file), "reviews", None, 1, write=True, reach=0, setting="denser")
    assert set(best) == {"fish"}, "only the methods that have a rate there"
    before, after = Params.load(file, {"settings.denser.lr.reviews.fish": 0.02}), Params.load(file)
    assert after.settings["denser"].lr == {"reviews": best} and after.methods == before.methods
    assert after.rate_key("reviews", "fish", "main") == "methods.fish.lr.reviews"
    found = json.loads((project.root / "metrics" / "tune-lr" / "reviews-denser.json").read_text())
    assert found["setting"] == "denser" and found["density"] == 0.2
