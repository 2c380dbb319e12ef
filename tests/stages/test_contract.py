"""dvc.yaml tells the truth: each stage's modules and params are exactly those it uses (CORRECTNESS 13)."""

import json
import math
import re
import sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from ruamel.yaml import YAML

from pipeline.params import Params
from pipeline.runtime.workspace import Cell, Workspace
from pipeline.training.halving import best_rate
from stages import aggregate
from stages.runner import Stage

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "dev"))
from modules import closure, imports, room_of, used_by  # noqa: E402

STAGES = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
CORE = [
    "parameters.py",
    "files.py",
    "runtime/atomic.py",
    "runtime/canonical.py",
    "losses.py",
    "fisher",
    "masks",
    "deltas",
    "training",
    "distributed",
]
EXPERIMENTS = ("checkpoint", "distribute")
HEAVY = {"mlflow", "dvc", "datasets", "typer", "pydantic", "transformers", "pyarrow", "sklearn", "rich"}


@pytest.mark.parametrize("name", STAGES)
def test_the_declared_modules_are_the_imported_ones(name):
    stage = STAGES[name]
    module = re.search(r"python -m (stages\.\w+)", stage["cmd"]).group(1)
    used = used_by(module.removeprefix("stages."))
    declared = {d for d in stage["deps"] if d.startswith(("pipeline", "stages"))}
    assert all((ROOT / path).exists() for path in declared), f"{name} declares what is not there"
    rooms = {room_of(path) for path in used}
    assert sorted(rooms - declared) == [], f"{name} uses modules that dvc.yaml does not declare"
    assert sorted(declared - rooms) == [], f"{name} declares modules that it does not use"


def resolve(text, item):
    return re.sub(r"\$\{item\.(\w+)\}", lambda match: item[match.group(1)], text)


def test_the_declared_params_are_the_read_ones():
    """The committed metrics record every key that their stage read: they must be those that dvc.yaml declares."""
    params = Params.load(ROOT / "params.yaml")
    checked = 0
    for name, stage in STAGES.items():
        if "metrics" not in stage or name.partition("-")[0] in EXPERIMENTS:
            continue
        folder = ROOT / "metrics" / re.search(r"stages\.(\w+)", stage["cmd"]).group(1)
        for item in items(stage.get("matrix", {}), params):
            file = folder / f"{'-'.join(item.values()) or 'all'}.json"
            declared = {resolve(key, item) for key in stage["params"]}
            read = set(json.loads(file.read_text())["params"])
            assert read == declared, f"{name} {item}"
            checked += 1
    assert checked > 30


class Stop(Exception):
    """The stage has read what it reads, and would begin its work."""


@pytest.mark.parametrize("profile", ["demo", "cifar", "local-sgd"])
@pytest.mark.parametrize("name", [name for name in STAGES if name.partition("-")[0] in EXPERIMENTS])
def test_an_experiment_reads_the_params_that_are_declared(name, profile, tmp_path, monkeypatch):
    """Every cell of a profile's grid, up to the point where the work begins."""
    params = Params.load(ROOT / "pipeline" / "profiles" / f"{profile}.yaml")
    module = import_module(f"stages.{name.partition('-')[0]}")

    def begin(*_, **__):
        raise Stop

    monkeypatch.setattr(
        module.Task, "load", lambda *_: SimpleNamespace(data_digest="0", metric="m", sizes={"train": 1_000_000})
    )
    monkeypatch.setattr(module, "use_threads", lambda count: None)
    monkeypatch.setattr(Stage, "held", begin)
    monkeypatch.setattr(module, "is_worker", lambda: True, raising=False)
    for item in items(STAGES[name]["matrix"], params):
        cell = Cell(module.__name__.removeprefix("stages."), *item.values())
        stage = Stage(cell, params, Workspace(tmp_path, tmp_path), track=False)
        if cell.stage == "distribute":
            world = SimpleNamespace(rank=0, size=params.distribute[cell.setting].workers)
            monkeypatch.setattr(module, "joined", lambda *_, world=world, **__: nullcontext(world))
        with pytest.raises(Stop):
            module.run(stage)
        assert set(stage.settings) == {resolve(key, item) for key in STAGES[name]["params"]}


def items(matrix, params):
    rows = [{}]
    for key, values in matrix.items():
        names = params.at(values[2:-1]) if isinstance(values, str) else values
        rows = [row | {key: value} for row in rows for value in names]
    return rows


def test_aggregate_reads_the_params_it_declares(tmp_path):
    """Without results: those in git may be of older code until the pipeline has run again."""
    stage = Stage(
        Cell("aggregate", "all"),
        Params.load(ROOT / "params.yaml"),
        Workspace(tmp_path, tmp_path),
        out=tmp_path / "out",
        track=False,
    )
    aggregate.run(stage)
    assert set(stage.settings) == set(STAGES["aggregate"]["params"])


def test_every_out_is_cached_and_every_metric_is_not():
    for name, stage in STAGES.items():
        assert all(isinstance(out, str) for out in stage["outs"]), (
            f"{name}: an uncached out disables the run cache"
        )
        for metric in stage.get("metrics", []):
            (settings,) = metric.values()
            assert settings == {"cache": False}, f"{name}: metrics belong to git"


def core_files():
    for entry in CORE:
        path = ROOT / "pipeline" / entry
        yield from path.rglob("*.py") if path.is_dir() else [path]


@pytest.mark.parametrize("file", sorted(map(str, core_files())))
def test_the_core_stands_alone(file):
    reached = {module.split(".")[0] for f in closure(Path(file)) for module in imports(f)}
    assert not reached & HEAVY
    outside = {
        "pipeline/tasks",
        "pipeline/tracking",
        "pipeline/reports",
        "pipeline/cli",
        "pipeline/commands",
        "pipeline/artifacts",
    }
    assert not [f for f in closure(Path(file)) if str(f.relative_to(ROOT)).startswith(tuple(outside))]


def test_no_pickle_and_no_torch_load_anywhere():
    for folder in ("pipeline", "stages"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text()
            assert "pickle" not in {m.split(".")[0] for m in imports(file)}, file
            assert not re.search(r"\btorch\.(load|save)\(", text), file


@pytest.mark.parametrize(
    "record", sorted((ROOT / "metrics" / "tune-lr").glob("*.json")), ids=lambda file: file.stem
)
def test_the_rates_in_force_are_those_that_the_recorded_searches_stand_for(record):
    found = json.loads(record.read_text())
    params, setting = Params.load(ROOT / "params.yaml"), found.get("setting", "main")
    for method, log in found["methods"].items():
        tried = {
            float(rate): [-math.inf if x is None else x for x in scores] for rate, scores in log["tried"].items()
        }
        workers = setting.removeprefix("distribute-")
        if workers != setting:
            key = f"distribute.{workers}.lr.{method}"
        else:
            key = params.rate_key(found["task"], method, setting)
        assert params.at(key) == log["best"] == best_rate(tried), f"{key}; {record}"
