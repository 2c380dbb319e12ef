"""The search of rates for workers: one worker scores as plain training does; two write what they tried."""

import json

import pytest

from pipeline.distributed.collectives import Collectives
from pipeline.params import Params
from pipeline.runtime.workspace import Cell
from pipeline.training.device import choose_device
from stages import tune_lr
from stages.distribute import plan
from stages.runner import Stage
from stages.tune_workers import shared_score

SECTION = """
distribute:
  main: {workers: 2, every: 4, lr: {fish: 0.01}}
"""


@pytest.fixture
def project(template, fork):
    """A project with a setting of two workers, fetched."""
    project = fork(template)
    file = project.root / "params.yaml"
    file.write_text(file.read_text().replace("epochs: 6", "epochs: 2") + SECTION)
    project.fishmask("fetch", "--task", "reviews", "--no-mlflow")
    (project.root / "artifacts" / "fetch" / "reviews" / "validation.parquet").unlink()  # is never read
    return project


def test_one_worker_scores_a_rate_as_plain_training_does(project, monkeypatch, one_thread):
    from pipeline.runtime.workspace import Workspace

    monkeypatch.chdir(project.root)
    params, here = Params.load(project.root / "params.yaml"), Workspace.here()
    wanted = params.distribute["main"].model_copy(update={"workers": 1})
    stage = Stage(Cell("distribute", "reviews", "fish", "main"), params, here, track=False)
    task, sharing, recipe, batch_size = plan(stage, wanted)
    device, settings = choose_device("cpu", "fp32"), params.tasks["reviews"]
    mask = tune_lr.tuning_mask(task, params, settings, "fish", 0, device, None)
    expected = tune_lr.tuning_score(task, settings, "fish", mask, recipe.lr, 0, device)
    assert shared_score(task, sharing, recipe, batch_size, device, Collectives()) == expected


def test_two_workers_search_on_train_alone_and_record_what_they_tried(project):
    command = ("tune-lr", "--task", "reviews", "--distribute", "main", "--seeds", "1")
    refused = project.fishmask(*command, check=False)
    assert refused.returncode == 2
    assert refused.stderr.strip() == (
        "fishmask: grid.distribute crosses no method with reviews and main; name one with --method"
    )
    done = project.fishmask(*command, "--method", "fish")
    assert "fish main" in done.stdout and "Traceback" not in done.stderr
    found = json.loads((project.root / "metrics" / "tune-lr" / "reviews-distribute-main.json").read_text())
    assert found["setting"] == "distribute-main" and found["train"]["epochs"] == 2
    tried = found["methods"]["fish"]["tried"]
    assert len(tried) >= 7 and all(0 <= scores[0] <= 1 for scores in tried.values())
    rates = Params.load(project.root / "params.yaml").distribute["main"].lr
    assert rates == {"fish": found["methods"]["fish"]["best"]}
