"""The shipped profiles: each loads and has the keys that dvc.yaml crosses; `paper` is the record to the letter."""

import re
from itertools import product
from pathlib import Path

import pytest

from pipeline.params import Params
from pipeline.runtime.yaml_files import plain, read_yaml
from pipeline.tasks.glue import TASKS
from pipeline.training.methods import method_named

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "pipeline" / "profiles").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_profile_loads_and_dvc_finds_what_it_crosses(file):
    params = Params.load(file)
    assert params.profile == file.stem
    for key in re.findall(r"\$\{(grid[\w.]+)\}", (ROOT / "dvc.yaml").read_text()):
        here = read_yaml(file)  # DVC reads the file itself and knows no defaults
        for part in key.split("."):
            assert part in here, f"DVC wants {key}"
            here = here[part]
        assert list(here) == params.at(key)
    for task, method, setting in params.grid.cells:
        assert params.methods[method].lr[task] > 0
        if method_named(method).needs_ranking:
            score = params.tasks[task].score.variant(method_named(method).variant)
            wanted = params.settings[setting].examples
            assert wanted is None or wanted in score.examples
            assert (params.settings[setting].density or params.tasks[task].density) <= score.keep


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_dvc_finds_every_param_of_every_stage(file):
    """It looks a key up when its stage is about to run, hours into it perhaps; at dots it goes one level down."""
    raw, checked = plain(read_yaml(file)), 0

    def find(key):
        here = raw
        for part in key.split("."):
            assert part in here, f"DVC misses {key}"
            here = here[part]
        return here

    for stage in read_yaml(ROOT / "dvc.yaml")["stages"].values():
        crossed = {name: find(values[2:-1]) for name, values in stage.get("matrix", {}).items()}
        for item in product(*crossed.values()):
            for key in stage["params"]:
                for name, value in zip(crossed, item, strict=True):
                    key = key.replace(f"${{item.{name}}}", value)
                assert "$" not in key and find(key) is not ...
                checked += 1
    assert checked > 100


@pytest.mark.parametrize("name", ["glue", "glue-full", "paper"])
def test_glue_tasks_are_those_of_the_hub(name):
    for task, settings in Params.load(ROOT / "pipeline" / "profiles" / f"{name}.yaml").tasks.items():
        known = TASKS[task]
        assert (settings.data.source, tuple(settings.data.text), settings.metric) == (
            known.source,
            known.text,
            known.metric,
        )


def test_the_paper_profile_is_the_record_to_the_letter():
    params = Params.load(ROOT / "pipeline" / "profiles" / "paper.yaml")
    assert set(params.grid.tasks) == set(TASKS) - {"wnli"}
    for name, task in params.tasks.items():
        assert task.model.source.endswith("bert-large-cased-whole-word-masking") and task.model.max_length == 128
        train, score = task.train, task.score
        assert (train.epochs, train.batch_size) == (7, 8 if name == "rte" else 16)
        assert (train.optimizer, train.weight_decay, train.schedule, train.warmup, train.clip) == (
            "adamw", 0.0, "linear", 0.0, 1.0,
        )  # fmt: skip
        assert (score.kind, score.power, score.selection, task.density) == ("label", "square", "global", 0.005)
        assert params.settings["main"].examples == 1024
        rates = {method: own.lr[name] for method, own in params.methods.items()}
        assert (rates["dense"], rates["fish"], rates["random"]) == (1e-5, 5e-5, 5e-5)
        assert rates["bitfit"] == {"cola": 1e-3, "mnli": 1e-3, "qnli": 1e-4}.get(name, 5e-4)
    swept = {(params.settings[s].density, params.settings[s].examples) for s in params.grid.sweep.settings}
    assert swept | {(0.005, 1024)} == {
        (d, e) for d in (0.0002, 0.001, 0.005, 0.021, 0.1) for e in (32, 256, 1024, 16384)
    }
