"""The score stage: one ranking a variant and count, each that of its own pass; what `fish-<variant>` trains."""

import shutil

import pytest

from pipeline.errors import ParamsError
from pipeline.masks.mask import Mask
from pipeline.masks.ranking import Ranking
from pipeline.params import Params
from pipeline.runtime.workspace import Cell, Workspace, ranking_file
from pipeline.tasks.base import Task
from pipeline.tasks.scoring import scores_for
from stages import fetch, mask, score
from stages.runner import Stage

VARIANTS = {"layer": {"selection": "per-layer"}, "warm": {"warm_head": 2}, "expect": {"kind": "expect"}}


@pytest.fixture
def project(template, tmp_path, monkeypatch):
    root = tmp_path / "project"
    shutil.copytree(template, root, symlinks=True)
    monkeypatch.chdir(root)
    overrides = {"tasks.reviews.score.variants": VARIANTS, "seeds": [3]}
    overrides |= {"tasks.reviews.score.exclude": ["bert.pooler"]}
    params = Params.load(root / "params.yaml", overrides)
    workspace = Workspace.here()
    for stage in (fetch, score):
        name = stage.__name__.rpartition(".")[2]
        stage.run(Stage(Cell(name, "reviews"), params, workspace, track=False))
    return workspace, params


def test_every_variant_and_count_is_scored_as_by_itself(project):
    workspace, params = project
    own = params.tasks["reviews"]
    task = Task.load(workspace.out(Cell("fetch", "reviews")), own.model, own.metric)
    folder = workspace.out(Cell("score", "reviews")) / "seed-3"
    assert len(list(folder.iterdir())) == 2 * (1 + len(VARIANTS))
    for name in ("", *VARIANTS):
        for count in (16, 64):
            ranking = Ranking.load(ranking_file(folder, name, count))
            how = own.score.variant(name).how()
            scores = scores_for("fish", task, task.model(3), examples=count, seed=3, head=own.head, **how)
            alone, cut = Mask.top_k(scores, 0.05, own.head), ranking.cut(0.05)
            assert cut.jaccard(alone) > 0.99, (name, count)  # sums of parts differ in their last bits
            assert ranking.info["examples"] == count and cut.count("bert.pooler.dense.weight") == 0
            assert ranking.info["selection"] == ("per-layer" if name == "layer" else "global")


def test_a_method_is_cut_from_its_variant(project):
    workspace, params = project
    folder = workspace.out(Cell("score", "reviews")) / "seed-3"
    for name in VARIANTS:
        cell = Cell("mask", "reviews", f"fish-{name}", "main")
        mask.run(Stage(cell, params, workspace, track=False))
        made = Mask.load(workspace.out(cell) / "seed-3" / "mask.safetensors")
        assert made == Ranking.load(ranking_file(folder, name, 64)).cut(0.05)
        assert made.info["method"] == f"fish-{name}"
    grid = {"grid.methods": ["dense", "fish", "random", "fish-cold"], "grid.ranked": ["fish", "fish-cold"]}
    with pytest.raises(ParamsError, match="score.variants"):
        Params.load("params.yaml", grid | {"methods.fish-cold": {"lr": {"reviews": 0.01}}})
