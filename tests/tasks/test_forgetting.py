"""What one task costs another: distances, bodies exchanged, masks compared; on cells that stages trained."""

import json
import math
import shutil

import pytest
import torch

from pipeline.errors import ArtifactError, ParamsError
from pipeline.masks.mask import Mask
from pipeline.masks.select import random
from pipeline.parameters import ParameterIndex
from pipeline.params import Params
from pipeline.runtime.workspace import Cell, Workspace
from pipeline.tasks.base import Task
from pipeline.tasks.forgetting import body, distance, measure, overlaps, transplant_
from pipeline.tasks.trained import trained
from stages import fetch, mask, train
from stages.runner import Stage

HEAD = ["classifier"]


def test_the_distance_leaves_the_head_out(make, folder):
    base, moved = make(folder).model(0), make(folder, out="again").model(1)
    assert distance(base, moved, HEAD) == {"l2": 0.0, "relative": 0.0}  # seeds differ in the head alone
    with torch.no_grad():
        moved.bert.pooler.dense.bias += 2.0
    squares = [
        float(p.detach().double().square().sum()) for n, p in base.named_parameters() if n.startswith("bert")
    ]
    norm = math.sqrt(sum(squares))
    found = distance(base, moved, HEAD)
    assert found["l2"] == pytest.approx(2 * 4) and found["relative"] == pytest.approx(8 / norm)


def test_a_body_is_exchanged_and_the_head_stays(make, folder):
    judge, model = make(folder).model(0), make(folder, out="again").model(1)
    with torch.no_grad():
        model.bert.pooler.dense.bias += 2.0
    before = judge.classifier.weight.detach().clone()
    transplant_(judge, model, HEAD)
    assert torch.equal(judge.classifier.weight, before) and distance(judge, model, HEAD)["l2"] == 0


def test_overlaps_between_tasks_and_seeds(make, folder):
    index = ParameterIndex.of(make(folder).model(0))
    masks = {seed: body(random(index, 0.2, seed, HEAD), HEAD) for seed in (0, 1)}
    found = overlaps({"a": masks, "b": {0: masks[0], 1: masks[0]}})
    assert found["tasks"]["a, b"] == {"0": 1.0, "1": pytest.approx(found["seeds"]["a"]["0, 1"])}
    assert found["seeds"]["a"]["0, 1"] == pytest.approx(0.2 / 1.8, abs=0.03) and found["seeds"]["b"]["0, 1"] == 1.0
    assert "classifier.weight" not in masks[0].index and isinstance(masks[0], Mask)


@pytest.fixture
def project(template, tmp_path, monkeypatch):
    """Two tasks over one base (the second with its labels turned round), trained by fish, lora and head."""
    root = tmp_path / "project"
    shutil.copytree(template, root, symlinks=True)
    monkeypatch.chdir(root)
    text = (root / "params.yaml").read_text()
    start, end = text.index("  reviews:\n"), text.index("settings:\n  main")
    second = text[start:end].replace("  reviews:", "  turned:").replace("data/reviews", "data/turned")
    text = text[:end] + second + text[end:]
    text = text.replace("{reviews: ", "{turned: 1.0e-2, reviews: ").replace("seeds: [0, 1]", "seeds: [0]")
    text = text.replace(
        "tasks: [reviews]\n  methods: [dense, fish, random]",
        "tasks: [reviews, turned]\n  methods: [dense, fish, random]",
    )
    text = text.replace("density: 0.05", "density: 0.2").replace("epochs: 6", "epochs: 2")
    text += "  head: {lr: {reviews: 1.0e-2, turned: 1.0e-2}}\n  lora: {lr: {reviews: 1.0e-2, turned: 1.0e-2}}\n"
    (root / "params.yaml").write_text(text)
    (root / "data" / "turned").mkdir()
    for file in (root / "data" / "reviews").iterdir():
        lines = file.read_text().replace("negative", "X").replace("positive", "negative").replace("X", "positive")
        (root / "data" / "turned" / file.name).write_text(lines)
    workspace = Workspace.here()
    params = Params.load(root / "params.yaml")
    for task in ("reviews", "turned"):
        fetch.run(Stage(Cell("fetch", task), params, workspace, track=False))
        for method in ("random", "lora", "head"):
            for stage in (mask, train):
                name = stage.__name__.rpartition(".")[2]
                stage.run(Stage(Cell(name, task, method, "main"), params, workspace, track=False))
    return workspace, params


def test_cells_are_measured_against_each_other(project):
    workspace, params = project
    for method in ("random", "head"):
        found = json.loads(measure(workspace, params, method, "main", "head").read_text())
        record = found["tasks"]["reviews"]["0"]
        task = Task.load(workspace.out(Cell("fetch", "turned")), params.tasks["turned"].model, "accuracy")
        judge = trained(task, workspace.out(Cell("train", "turned", "head", "main")), 0)
        assert record["turned"]["before"] == task.evaluate(judge, "validation", 64)["accuracy"]
        assert set(found["overlap"]["tasks"]) == {"reviews, turned"}
        if method == "head":  # nothing but the head was trained: nothing moved, nothing is forgotten
            assert record["distance"]["l2"] == 0 and record["turned"]["after"] == record["turned"]["before"]
        else:
            assert record["distance"]["l2"] > 0 and found["overlap"]["tasks"]["reviews, turned"]["0"] == 1.0
    found = json.loads(measure(workspace, params, "lora", "main", "head").read_text())
    assert found["overlap"] == {"tasks": {}, "seeds": {}}, "an adapter's values are none of the base's"
    assert found["tasks"]["reviews"]["0"]["distance"]["l2"] > 0
    with pytest.raises(ParamsError, match="--probe random: it trains more than the head"):
        measure(workspace, params, "random", "main", "random")
    with pytest.raises(ParamsError, match="no two tasks share a base"):
        only = params.model_copy(update={"grid": params.grid.model_copy(update={"tasks": ["turned"]})})
        measure(workspace, only, "random", "main", "head")


def test_a_trained_cell_scores_what_its_metrics_say(project):
    workspace, params = project
    task = Task.load(workspace.out(Cell("fetch", "reviews")), params.tasks["reviews"].model, "accuracy")
    for method in ("random", "lora", "head"):
        cell = Cell("train", "reviews", method, "main")
        seed = json.loads(workspace.metrics(cell).read_text())["seeds"]["0"]
        model = trained(task, workspace.out(cell), 0)
        assert task.evaluate(model, "validation", 64)["accuracy"] == seed["metric"]
        assert seed["density"] <= 0.2 and seed["parameters"] == ParameterIndex.of(task.model(0)).total
        folder = workspace.out(cell) / "seed-0"
        assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) == seed["delta_bytes"]
    with pytest.raises(ArtifactError, match="train the cell first"):
        trained(task, workspace.out(cell), 7)
