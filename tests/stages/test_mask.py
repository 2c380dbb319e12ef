"""What the mask stage records of its masks."""

import json

import torch

from pipeline.masks.mask import Mask
from pipeline.masks.select import random
from pipeline.parameters import ParameterIndex
from pipeline.params import Params
from pipeline.runtime.workspace import Cell, Workspace
from stages import fetch, mask, score
from stages.mask import by_layer
from stages.runner import Stage


def test_coordinates_are_counted_by_layer_in_the_models_order():
    index = ParameterIndex({
        "embed.words.weight": (10, 4), "encoder.layer.2.a.weight": (4, 4), "encoder.layer.2.a.bias": (4,),
        "encoder.layer.10.a.weight": (4, 4), "head.weight": (2, 4),
    })  # fmt: skip
    mask = random(index, 0.5, 0, ["head"])
    layers = by_layer(mask)
    assert [layer["layer"] for layer in layers] == ["embed.words", "encoder.layer.2", "encoder.layer.10", "head"]
    assert [layer["numel"] for layer in layers] == [40, 20, 16, 8]
    assert layers[-1]["count"] == 8 and sum(layer["count"] for layer in layers) == mask.nnz == 42
    alone = Mask(index, {"encoder.layer.2.a.bias": torch.tensor([1, 3])})
    assert [layer["count"] for layer in by_layer(alone)] == [0, 2, 0, 0]


def test_the_examples_recorded_are_those_there_were(template, fork, monkeypatch):
    """Figure 2 goes to 16,384 examples, more than most tasks have: what was scored is what a table may say."""
    project = fork(template)
    project.edit("examples: [16, 64]", "examples: [16, 9999]")
    project.edit("seeds: [0, 1]", "seeds: [0]")
    monkeypatch.chdir(project.root)
    workspace, params = Workspace.here(), Params.load("params.yaml")
    for stage, *cell in (
        (fetch,),
        (score,),
        (mask, "fish", "main"),
        (mask, "fish", "denser"),
        (mask, "random", "main"),
    ):
        name = stage.__name__.rpartition(".")[2]
        stage.run(Stage(Cell(name, "reviews", *cell), params, workspace, track=False))
    rows = json.loads(workspace.metrics(Cell("fetch", "reviews")).read_text())["splits"]["train"]["rows"]
    cells = {"reviews-fish-main": rows, "reviews-fish-denser": 16, "reviews-random-main": None}
    assert {name: project.metrics(f"mask/{name}")["examples"] for name in cells} == cells
