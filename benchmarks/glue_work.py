"""The parts of `benchmarks.glue`, as a worker process does them: a stage's cell, a mask or a run of the search."""

import json
import math
import os
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.files import write_json
from pipeline.masks.mask import Mask
from pipeline.params import Params
from pipeline.runtime.workspace import Cell, Workspace, code_digest
from pipeline.schema import ModelParams
from pipeline.tasks.base import Task
from pipeline.tasks.forgetting import measure
from pipeline.training.device import choose_device
from pipeline.training.fingerprint import fingerprint
from stages import fetch, mask, score, train
from stages.runner import Stage, use_threads
from stages.tune_lr import at_setting, tuning_mask, tuning_score


def prepare(root: Path, params: Params) -> None:
    """Make ready, while the first data is fetched: the folder, the threads, the imports, the device."""
    import sklearn.metrics  # noqa: F401
    import torch._dynamo  # noqa: F401  asked for by the first optimizer
    from transformers.models.auto import modeling_auto, tokenization_auto  # noqa: F401
    from transformers.models.bert import modeling_bert  # noqa: F401

    os.chdir(root)  # params.yaml may name folders relative to itself
    use_threads(params.threads)
    torch.zeros((), device=choose_device(params.device, params.precision).device)


def fetch_task(params: Params, name: str) -> int:
    """Fetch a task, unless it is; the rows of train."""
    _stage(fetch, Cell("fetch", name), params)
    manifest = json.loads((_workspace().out(Cell("fetch", name)) / "manifest.json").read_text())
    return int(manifest["splits"]["train"]["rows"])


def score_task(params: Params, name: str) -> None:
    """Rank a task's parameters, in every way that its methods need."""
    _stage(score, Cell("score", name), params)


def train_cell(params: Params, name: str, method: str, setting: str) -> None:
    """Cut the masks of a cell and train through them."""
    _stage(mask, Cell("mask", name, method, setting), params)
    _stage(train, Cell("train", name, method, setting), params)


def forget(params: Params, method: str) -> None:
    """Measure what training on one task costs the others."""
    measure(_workspace(), params, method, "main", "head")


def choose_mask(params: Params, name: str, method: str, seed: int) -> None:
    """Choose the mask that the search trains through, unless it is there."""
    file = _kept(params, name, method, seed).with_suffix(".safetensors")
    if not file.is_file():
        settings = at_setting(params, name, "main")
        device = choose_device(params.device, params.precision)
        found = tuning_mask(_task(params, name), params, settings, method, seed, device, None)
        file.parent.mkdir(parents=True, exist_ok=True)
        found.save(file)


def try_rate(params: Params, name: str, method: str, rate: float, seed: int) -> float:
    """Train and score one run of the search, unless its score is there; -inf if it diverges."""
    file = _kept(params, name, method, seed, rate).with_suffix(".json")
    if not file.is_file():
        task, settings = _task(params, name), at_setting(params, name, "main")
        chosen = Mask.load(_kept(params, name, method, seed).with_suffix(".safetensors"))
        device = choose_device(params.device, params.precision)
        reached = tuning_score(task, settings, method, chosen, rate, seed, device)
        write_json(file, {"score": reached if math.isfinite(reached) else None})
    kept = json.loads(file.read_text())["score"]
    return -math.inf if kept is None else float(kept)


def _stage(stage: Any, cell: Cell, params: Params) -> None:
    """Run a stage's cell, unless it has metrics."""
    workspace = _workspace()
    if not workspace.metrics(cell).is_file():
        stage.run(Stage(cell, params, workspace, track=False))


def _workspace() -> Workspace:
    return Workspace(Path.cwd(), Path.cwd())


def _kept(params: Params, name: str, method: str, seed: int, rate: float | None = None) -> Path:
    """Where a mask or a score of the search is kept, by all that decides it; the suffix is the caller's."""
    inputs = {
        "task": at_setting(params, name, "main").model_dump(exclude={"data"}),
        "data": _task(params, name).data_digest,
        "method": params.methods[method].model_dump(exclude={"lr"}),
        "dense": params.methods["dense"].lr[name] if method in params.grid.learned else None,
        "device": choose_device(params.device, params.precision).reason,
        "threads": params.threads,
        "code": code_digest(),
    }
    key = fingerprint(**inputs, name=method, seed=seed, rate=rate)[:24]
    return _workspace().root / ".resume" / "tune-lr" / f"{name}-{method}-{key}"


def _task(params: Params, name: str) -> Task:
    settings = params.tasks[name]
    return _opened(_workspace().out(Cell("fetch", name)), settings.model, settings.metric)


@cache
def _opened(folder: Path, model: ModelParams, metric: str) -> Task:
    return Task.load(folder, model, metric)
