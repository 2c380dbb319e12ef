"""The project as a whole: running it, what it would cost, and what came out."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.errors import DataError, FishmaskError
from pipeline.params import Params
from pipeline.runtime.terminal import print_table
from pipeline.runtime.warm import warm_process
from pipeline.runtime.workspace import Cell, Workspace

_FEW = 2  # stages that are started cold: warming up would cost as much


def dvc(arguments: list[str], more: dict[str, str] | None = None, **options: Any) -> "subprocess.Popen[str]":
    """Start DVC with this interpreter, which its stages then find first on PATH (TRAPS D12)."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    command = [sys.executable, "-m", "dvc", *arguments]
    environment = os.environ | {"PATH": path} | (more or {})
    return subprocess.Popen(command, env=environment, cwd=Workspace.here().root, text=True, **options)


def repro(arguments: list[str]) -> None:
    """Run ``dvc repro``, with a line per stage that says how far it is.

    Stages that fetched other files than lie in their folder now are run again first.

    Raises:
        FishmaskError: if DVC fails; its own message stands above.
    """  # noqa: DOC502 - raised by what it calls
    # DVC reads params.yaml raw: a mistake would end the first stage.
    params = Params.load(Workspace.here().root / "params.yaml")
    sources = changed_sources(params)
    cells = planned([argument for argument in arguments if not argument.startswith("-")], sources)
    again = [] if "--dry" in arguments else [name for name in sources if name in cells]
    progress = _Progress(cells)
    with contextlib.ExitStack() as stack:
        environment = stack.enter_context(warm_process()) if len(cells) > _FEW else {}
        for name in again:
            print(f"{name}: the files of its folder are not those that were fetched; they are fetched again")
        if again:  # --force: DVC would take the former rows from its run cache
            progress.follow(
                dvc(["repro", "--force", "--single-item", *again], environment, stdout=subprocess.PIPE)
            )
        progress.follow(dvc(["repro", *arguments], environment, stdout=subprocess.PIPE))


class _Progress:
    """Tells of the stages that DVC starts how far it is."""

    def __init__(self, cells: list[str]) -> None:
        self.total, self.done, self.started = len(cells), 0, time.monotonic()
        costs = [_cost(name) for name in cells]
        known = [cost for cost in costs if cost]
        guess = statistics.mean(known) if known else 0.0
        self.costs = [cost or guess for cost in costs]

    def follow(self, process: "subprocess.Popen[str]") -> None:
        """Print a line for each stage that DVC starts, and what DVC says besides.

        Raises:
            FishmaskError: if DVC fails.
        """
        try:
            for line in process.stdout or ():
                name = _running(line)
                if name:
                    self._tell(name)
                elif line.strip() and not line.startswith((">", "Updating lock file", "Generating lock file")):
                    print(line, end="", flush=True)
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        if code:
            raise FishmaskError(f"dvc repro ended with exit code {code}; the stage's own line stands above")

    def _tell(self, name: str) -> None:
        left = sum(self.costs[self.done :])
        self.done += 1
        note = f", about {_clock(left)} left" if left else ""
        print(
            f"[{self.done}/{self.total}] {name} (after {_clock(time.monotonic() - self.started)}{note})",
            flush=True,
        )


def changed_sources(params: Params) -> list[str]:
    """Name the fetch stages whose folder holds other files than were fetched.

    DVC compares a stage's settings, not the folder that they name. A folder that is not there is not looked at:
    fetched data can be used without it.

    Returns:
        Names such as ``fetch@reviews``.
    """
    workspace, names = Workspace.here(), []
    for task in params.grid.tasks:
        file = workspace.metrics(Cell("fetch", task))
        fetched = json.loads(file.read_text()).get("files") if file.is_file() else None
        if fetched is not None:
            from pipeline.tasks.raw import source_digest

            with contextlib.suppress(DataError):
                if source_digest(task, params.tasks[task].data) not in (None, fetched):
                    names.append(f"fetch@{task}")
    return names


def planned(targets: Sequence[str] = (), sources: Sequence[str] = ()) -> list[str]:
    """Name the stages that ``dvc repro`` would run now, in order: the changed ones and all that follow from them.

    A stage that follows but would get the same inputs again is skipped by DVC, so there may be fewer in the end.

    Args:
        targets: stages to reproduce, with what they depend on; all by default.
        sources: stages that DVC does not know to be changed (``changed_sources``).

    Returns:
        Names such as ``train@words-fish-main``.
    """
    import networkx
    from dvc.exceptions import DvcException
    from dvc.repo import Repo, lock_repo

    with _one_line(DvcException), Repo(str(Workspace.here().root)) as repo, lock_repo(repo):
        graph = repo.index.graph  # an edge from each stage to those that it depends on
        names = {stage.addressing: stage for stage in graph}
        wanted = [stage for name, stage in names.items() if name in targets or name.partition("@")[0] in targets]
        order = list(
            dict.fromkeys(s for stage in wanted or graph for s in networkx.dfs_postorder_nodes(graph, stage))
        )
        # Not repo.status(names): it reads dvc.lock anew for every name, a second each.
        with contextlib.redirect_stdout(sys.stderr):
            changed = {stage for stage in order if stage.status(check_updates=True)}
        changed |= {names[name] for name in sources if names.get(name) in order}
        stale = changed | {stage for one in changed for stage in networkx.ancestors(graph, one)}
        return [stage.addressing for stage in order if stage in stale]


@contextlib.contextmanager
def _one_line(kind: type[Exception]) -> Iterator[None]:
    """Say in one line what DVC says of the project."""
    try:
        yield
    except kind as error:
        raise FishmaskError(
            f"DVC: {str(error).splitlines()[0]}; a project needs git, `dvc init` and dvc.yaml"
        ) from None


def print_plan(as_json: bool) -> None:
    """Print what would run, and what each stage cost on this machine the last time."""
    params = Params.load(Workspace.here().root / "params.yaml")
    rows = [(name, _cost(name)) for name in planned(sources=changed_sources(params))]
    known = [cost for _, cost in rows if cost]
    total = sum(known)
    if as_json:
        print(json.dumps({"stages": [{"stage": n, "seconds": c} for n, c in rows], "known_seconds": total}))
        return
    if not rows:
        print("nothing to run: everything is up to date")
        return
    print_table(
        ("stage", "last cost here"), [(name, f"{cost:.1f} s" if cost else "unknown") for name, cost in rows]
    )
    print(f"{len(rows)} stages; {len(known)} of them took {_clock(total)} here the last time")


def print_results() -> None:
    """Print the main table, where the report is, and how to open MLflow."""
    from pipeline.reports.reading import load_results
    from pipeline.reports.tables import main_table

    root = Workspace.here().root
    grid = Params.load(root / "params.yaml").grid
    Console().print(main_table(load_results(root / "metrics", grid.cells)).terminal())
    print(f"report: {root / 'reports' / 'index.html'}")
    print("runs:   fishmask ui   (MLflow on http://127.0.0.1:5000)")


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
