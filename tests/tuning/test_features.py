"""The head on features that are computed once ends where training it inside the frozen network does."""

import json
import shutil

import pytest
import torch

from pipeline.schema import DataParams, ModelParams
from pipeline.tasks.base import Task
from pipeline.tasks.fetch import fetch
from pipeline.tasks.fitting import fit_task
from pipeline.training.device import choose_device
from pipeline.training.methods import mask_for
from pipeline.training.recipe import Recipe
from pipeline.tuning.features import MOST_BYTES, head_task

DEVICE = choose_device("cpu", "fp32")
RECIPE = Recipe(epochs=3, lr=0.05, schedule="linear", warmup=0.1, clip=1.0, seed=3)


@pytest.fixture
def task_of(tmp_path, write_csv, reviews):
    def make(model, rows=90):
        (tmp_path / "rows").mkdir()
        for split, count, seed in (("train", rows, 0), ("validation", 20, 1)):
            long = [
                (f"{text} {'film ' * (i % 7)}", verdict) for i, (text, verdict) in enumerate(reviews(count, seed))
            ]
            write_csv(f"rows/{split}.csv", ["text", "label"], [(t, int(v == "good")) for t, v in long])
        (tmp_path / "fetched").mkdir()
        source = ModelParams(source=str(model), max_length=24)
        data = DataParams(source=str(tmp_path / "rows"), text=["text"], label="label")
        fetch("r", kind="text", data=data, model=source, out=tmp_path / "fetched", metric="accuracy")
        return Task.load(tmp_path / "fetched", source, "accuracy")

    return make


def test_it_ends_where_training_inside_the_network_does(task_of, bert, tmp_path):
    still = tmp_path / "bert"
    shutil.copytree(bert, still)
    config = json.loads((still / "config.json").read_text())
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (still / "config.json").write_text(json.dumps(config | drops))
    whole = task_of(still)
    alone = head_task(whole, 3, ["classifier"], 7, DEVICE)
    ends = []
    for task in (whole, alone):
        model = task.model(3)
        mask = mask_for("head", model, density=0.1, head=["classifier"], seed=3)
        result = fit_task(task, model, mask, RECIPE, 8, DEVICE, name="head")
        ends.append((result.history, model.get_submodule("classifier").weight.detach()))
    assert len(dict(alone.model(3).named_parameters())) == 2 and mask.nnz == 66
    torch.testing.assert_close(ends[1][1], ends[0][1], rtol=1e-4, atol=1e-5)
    for one, other in zip(*(history for history, _ in ends), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert ends[0][0][-1]["loss"] < ends[0][0][0]["loss"]


def test_a_parts_rows_are_those_of_the_task(task_of, bert):
    whole = task_of(bert)
    alone = head_task(whole, 0, ["classifier"], 16, DEVICE)
    for split in ("fit", "tune", "train", "validation"):
        batches = [list(task.batches(split, 8, seed=1, epoch=2)) for task in (whole, alone)]
        assert [b["labels"].tolist() for b in batches[0]] == [targets.tolist() for _, targets in batches[1]]


def test_a_head_that_is_no_last_module_is_left_alone(task_of, decoder):
    assert head_task(task_of(decoder("gpt2")), 0, ["score"], 8, DEVICE) is None  # applied to every token


def test_features_that_take_too_much_are_left_alone(task_of, bert, monkeypatch):
    task = task_of(bert)
    assert head_task(task, 0, ["bert.pooler", "classifier"], 8, DEVICE) is None  # two modules
    monkeypatch.setattr("pipeline.tuning.features.MOST_BYTES", 90 * 32 * 4)
    assert head_task(task, 0, ["classifier"], 8, DEVICE) is not None and MOST_BYTES == 2**30
    monkeypatch.setattr("pipeline.tuning.features.MOST_BYTES", 90 * 32 * 4 - 1)
    assert head_task(task, 0, ["classifier"], 8, DEVICE) is None
