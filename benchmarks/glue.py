"""Table 1 and Figure 2 on a bare machine: one process, no DVC, no MLflow; goes on where it was stopped.

    FISHMASK_DATA=FOLDER python -m benchmarks.glue --out glue-run
    FISHMASK_DATA=FOLDER python -m benchmarks.glue --out glue-run --task rte --method fish --method random --sweep

Runs the stages of a profile in a project folder of its own (``--out``): fetch, tune-lr, score, mask, train,
forget, report. A cell with metrics is not run again: delete its file below ``metrics/`` to repeat it.
``--result FILE`` writes the tables, the command and the hardware as markdown. On one GPU `glue-full` takes minutes
a task; on CPU cores hours.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.rounds import header
from pipeline.errors import FishmaskError
from pipeline.files import write_bytes
from pipeline.params import Params
from pipeline.reports.page import write_report
from pipeline.runtime.cpu import set_up_cpu
from pipeline.runtime.workspace import Cell, Workspace
from pipeline.runtime.yaml_files import parse_overrides
from pipeline.tasks.forgetting import measure
from stages import fetch, mask, score, train
from stages.runner import Stage
from stages.tune_lr import tune

PROFILES = Path(__file__).parent.parent / "pipeline" / "profiles"


def main() -> None:
    """Run what is left of the profile, then write the report."""
    set_up_cpu()
    options = _options()
    root = options.out.resolve()
    root.mkdir(parents=True, exist_ok=True)
    file = root / "params.yaml"
    if not file.is_file():
        write_bytes(file, (PROFILES / f"{options.profile}.yaml").read_bytes())
    overrides = parse_overrides(options.set or [])
    params = Params.load(file, overrides)
    tasks, methods = options.task or params.grid.tasks, options.method or params.grid.methods
    workspace = Workspace(root, root)
    os.chdir(root)  # params.yaml may name folders relative to itself
    started = time.monotonic()
    for task in tasks:
        _run(fetch.run, Cell("fetch", task), params, workspace)
        if options.tune:
            params = _tune(workspace, overrides, task, methods, options.tune)
        if set(methods) & set(params.grid.ranked):
            _run(score.run, Cell("score", task), params, workspace)
        settings = {(method, "main") for method in methods}
        if options.sweep and task in params.grid.sweep.tasks:
            sweep = params.grid.sweep
            settings |= {(m, s) for m in sweep.methods if m in methods for s in sweep.settings}
        for method, setting in sorted(
            settings, key=lambda pair: (pair[1] != "main", methods.index(pair[0]), pair)
        ):
            for stage, name in ((mask.run, "mask"), (train.run, "train")):
                _run(stage, Cell(name, task, method, setting), params, workspace)
    if options.forget:
        kept = params.model_copy(update={"grid": params.grid.model_copy(update={"tasks": tasks})})
        for method in ("dense", "fish", "random"):
            if {method, "head"} <= set(methods) and len(tasks) > 1:
                measure(workspace, kept, method, "main", "head")
    write_report(root / "metrics", root / "reports", params.profile, params.grid.cells)
    print(f"report: {root / 'reports' / 'index.html'}; {time.monotonic() - started:.0f} s")
    if options.result:
        write_bytes(options.result, _result(root).encode())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the project's folder")
    parser.add_argument("--profile", default="glue-full", choices=[path.stem for path in PROFILES.glob("*.yaml")])
    parser.add_argument("--task", action="append", help="only this task; repeat for several")
    parser.add_argument("--method", action="append", help="only this method; repeat for several")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="in place of params.yaml's")
    parser.add_argument(
        "--tune", type=int, default=2, metavar="RUNGS", help="seeds of tune-lr; 0: rates as they are"
    )
    parser.add_argument("--sweep", action="store_true", help="Figure 2 too")
    parser.add_argument("--forget", action="store_true", help="forgetting and overlaps too; needs method head")
    parser.add_argument("--result", type=lambda text: Path(text).resolve(), help="markdown file of the tables")
    return parser.parse_args()


def _run(work: Any, cell: Cell, params: Params, workspace: Workspace) -> None:
    """Run a stage's cell, unless it has metrics; a failure of one cell is told and the others go on."""
    if workspace.metrics(cell).is_file():
        return
    started = time.monotonic()
    try:
        work(Stage(cell, params, workspace, track=False))
    except FishmaskError as error:
        print(f"{cell.stage} {cell.name}: {error}", flush=True)
        return
    print(f"{cell.stage} {cell.name}: {time.monotonic() - started:.1f} s", flush=True)


def _tune(workspace: Workspace, overrides: dict[str, Any], task: str, methods: list[str], rungs: int) -> Params:
    """Find the rates that were not found yet; dense first, since learned masks use its rate."""
    params = Params.load(workspace.root / "params.yaml", overrides)
    file = workspace.metrics(Cell("tune-lr", task))
    found = json.loads(file.read_text())["methods"] if file.is_file() else {}
    for method in sorted(methods, key=lambda name: name != "dense"):
        if method not in found:
            started = time.monotonic()
            tune(workspace, params, task, [method], rungs, write=True)
            params = Params.load(workspace.root / "params.yaml", overrides)
            print(f"tune-lr {task}-{method}: {time.monotonic() - started:.1f} s", flush=True)
    return params


def _result(root: Path) -> str:
    """The tables as they stand in the report, below where and how they were made."""
    tables = [path.read_text() for path in sorted((root / "reports" / "tables").glob("*.md"))]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return "\n".join([*header("GLUE, methods side by side", device), *tables])


if __name__ == "__main__":
    main()
