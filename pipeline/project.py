"""The project as a whole: running it, switching its profile, what it would cost, where a number comes from."""

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.errors import FishmaskError, ParamsError, unknown
from pipeline.files import write_bytes
from pipeline.params import Params
from pipeline.warm import warm_process
from pipeline.workspace import VERSION, Cell, Workspace
from pipeline.yaml_files import read_yaml

_FEW = 2  # stages that are started cold: warming up would cost as much
_PACKAGES = ("torch", "torchvision", "transformers", "datasets", "dvc", "mlflow", "typer", "safetensors", "numpy")


def dvc(arguments: list[str], more: dict[str, str] | None = None, **options: Any) -> "subprocess.Popen[str]":
    """Start DVC with this interpreter, which its stages then find first on PATH (TRAPS D12)."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    command = [sys.executable, "-m", "dvc", *arguments]
    environment = os.environ | {"PATH": path} | (more or {})
    return subprocess.Popen(command, env=environment, cwd=Workspace.here().root, text=True, **options)


def repro(arguments: list[str]) -> None:
    """Run ``dvc repro``, with a line per stage that says how far it is.

    Raises:
        FishmaskError: if DVC fails; its own message stands above.
    """
    cells = planned([argument for argument in arguments if not argument.startswith("-")])
    costs = [_cost(name) for name in cells]
    with contextlib.ExitStack() as stack:
        environment = stack.enter_context(warm_process()) if len(cells) > _FEW else {}
        process = dvc(["repro", *arguments], environment, stdout=subprocess.PIPE)
        try:
            code = _follow(process, cells, costs)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if code:
        raise FishmaskError(f"dvc repro ended with exit code {code}; the stage's own line stands above")


def _follow(process: "subprocess.Popen[str]", cells: list[str], costs: list[float | None]) -> int:
    """Print a line for each stage that DVC starts, and what DVC says besides; returns its exit code."""
    known = [cost for cost in costs if cost]
    guess = statistics.mean(known) if known else 0.0
    started, done = time.monotonic(), 0
    for line in process.stdout or ():
        name = _running(line)
        if name:
            left = sum(cost or guess for cost in costs[done:])
            done += 1
            note = f", about {_clock(left)} left" if left else ""
            print(f"[{done}/{len(cells)}] {name} (after {_clock(time.monotonic() - started)}{note})", flush=True)
        elif line.strip() and not line.startswith((">", "Updating lock file", "Generating lock file")):
            print(line, end="", flush=True)
    return process.wait()


def planned(targets: Sequence[str] = ()) -> list[str]:
    """Name the stages that ``dvc repro`` would run now, in order: the changed ones and all that follow from them.

    A stage that follows but would get the same inputs again is skipped by DVC, so there may be fewer in the end.

    Args:
        targets: stages to reproduce, with what they depend on; all by default.

    Returns:
        Names such as ``train@words-fish-main``.
    """
    import networkx
    from dvc.repo import Repo

    with Repo(str(Workspace.here().root)) as repo:
        graph = repo.index.graph  # an edge from each stage to those that it depends on
        names = {stage.addressing: stage for stage in graph}
        wanted = [stage for name, stage in names.items() if name in targets or name.partition("@")[0] in targets]
        order = list(
            dict.fromkeys(s for stage in wanted or graph for s in networkx.dfs_postorder_nodes(graph, stage))
        )
        with contextlib.redirect_stdout(sys.stderr):
            changed = {names[name] for name in repo.status([s.addressing for s in order])}
        stale = changed | {stage for one in changed for stage in networkx.ancestors(graph, one)}
        return [stage.addressing for stage in order if stage in stale]


def print_plan(as_json: bool) -> None:
    """Print what would run, and what each stage cost on this machine the last time."""
    rows = [(name, _cost(name)) for name in planned()]
    known = [cost for _, cost in rows if cost]
    total = sum(known)
    if as_json:
        print(json.dumps({"stages": [{"stage": n, "seconds": c} for n, c in rows], "known_seconds": total}))
        return
    if not rows:
        print("nothing to run: everything is up to date")
        return
    table = Table("stage", "last cost here")
    for name, cost in rows:
        table.add_row(name, f"{cost:.1f} s" if cost else "unknown")
    Console().print(table)
    print(f"{len(rows)} stages; {len(known)} of them took {_clock(total)} here the last time")


def profile_names() -> list[str]:
    """Name the profiles that ship with the package."""
    return sorted(
        entry.name[:-5] for entry in files("pipeline.profiles").iterdir() if entry.name.endswith(".yaml")
    )


def profile_text(name: str) -> str:
    """The text of a profile."""
    if name not in profile_names():
        raise ParamsError(f"profile: unknown {unknown(name, profile_names())}")
    return files("pipeline.profiles").joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def current_profile() -> str | None:
    """The profile that params.yaml says it is."""
    value = read_yaml(Workspace.here().root / "params.yaml").get("profile")
    return str(value) if value else None


def switch_profile(name: str, *, force: bool = False) -> None:
    """Make a profile the project's params.yaml; edits that no profile holds are kept unless forced.

    Raises:
        ParamsError: if params.yaml was edited and ``force`` is not given.
    """
    text, file = profile_text(name), Workspace.here().root / "params.yaml"
    present = file.read_text(encoding="utf-8")
    if present == text:
        return
    if not force and present not in {profile_text(other) for other in profile_names()}:
        raise ParamsError("params.yaml: edited since its profile was set; commit or copy it, then add --force")
    write_bytes(file, text.encode())


def print_results() -> None:
    """Print the main table, where the report is, and how to open MLflow."""
    from pipeline.reports.results import load_results
    from pipeline.reports.tables import main_table

    root = Workspace.here().root
    grid = Params.load(root / "params.yaml").grid
    Console().print(main_table(load_results(root / "metrics", grid.cells)).terminal())
    print(f"report: {root / 'reports' / 'index.html'}")
    print("runs:   fishmask ui   (MLflow on http://127.0.0.1:5000)")


def print_doctor(as_json: bool) -> None:
    """Print what this machine and project are like."""
    import torch

    from pipeline.tracking import tracking_uri
    from pipeline.training.device import choose_device

    here = Workspace.here()
    facts: dict[str, Any] = {
        "fishmask": VERSION,
        "device": choose_device().reason,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "free disk": f"{shutil.disk_usage(here.root).free / 2**30:.1f} GiB",
        "project": str(here.root),
        "mlflow": tracking_uri(here.home),
        "data folder": os.environ.get(
            "FISHMASK_DATA", "FISHMASK_DATA is not set; data comes from packages or the hub"
        ),
        "profile": current_profile(),
    } | {name: _version_of(name) for name in _PACKAGES}
    if as_json:
        print(json.dumps(facts))
    else:
        width = max(map(len, facts))
        print("\n".join(f"{key:<{width}}  {value}" for key, value in facts.items()))


def print_why(name: str, as_json: bool) -> None:
    """Trace a cell's number to its artifacts, its MLflow runs and the commit that recorded it.

    Raises:
        ParamsError: if no metrics of that cell are there; names the closest cell.
    """
    here = Workspace.here()
    known = {file.stem: file for file in (here.root / "metrics" / "train").glob("*.json")}
    if name not in known:
        raise ParamsError(f"metrics/train: unknown cell {unknown(name, known)}")
    metrics = json.loads(known[name].read_text())
    scores = [seed["metric"] for seed in metrics["seeds"].values()]
    finite = [score for score in scores if score is not None]
    facts: dict[str, Any] = {
        "cell": name,
        metrics["metric"]: scores,
        "mean": statistics.mean(finite) if finite else None,
        "params": metrics["params"],
        "data": metrics["data"],
        "masks": {seed: value["mask_digest"] for seed, value in metrics["seeds"].items()},
        "deltas": {seed: value.get("delta_digest") for seed, value in metrics["seeds"].items()},
        "dvc": dict(_locked_outs(here.root, name)),
        "commit": _git(here.root, "log", "-1", "--format=%h %s", "--", str(known[name])) or "not committed",
        "mlflow": _runs(here, name),
    }
    if as_json:
        print(json.dumps(facts))
    else:
        for key, value in facts.items():
            print(f"{key}: {json.dumps(value) if isinstance(value, (dict, list)) else value}")


def _runs(here: Workspace, name: str) -> list[str]:
    from pipeline.tracking import runs_of

    return runs_of(here.home, {"stage": "train", "cell": name})


def _locked_outs(root: Path, name: str) -> Iterator[tuple[str, str]]:
    lock = root / "dvc.lock"
    if lock.is_file():
        for stage in read_yaml(lock).get("stages", {}).values():
            for out in stage.get("outs", []):
                if name in Path(out["path"]).parts:
                    yield out["path"], out["md5"]


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def _running(line: str) -> str | None:
    """The stage named in DVC's line ``Running stage 'train@words-fish-main':``."""
    return line.split("'")[1] if line.startswith("Running stage '") else None


def _cost(name: str) -> float | None:
    """What a DVC stage cost here the last time, in seconds."""
    group, _, cell = name.partition("@")
    stage = group.partition("-")[0]
    file = Workspace.here().timing(Cell(stage, cell or "all"))
    return float(json.loads(file.read_text())["seconds"]) if file.is_file() else None


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
