"""`fishmask fetch|score|mask|train|distribute|aggregate|tune-lr`: one stage alone, exactly as DVC runs it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.options import Density, Method, Out, Seed, Sets, Setting, Task, Track
from pipeline.errors import ParamsError

if TYPE_CHECKING:
    from stages.runner import Stage

app = typer.Typer()
PANEL = "Single stages"


def run_stage(
    work: "Callable[[Stage], None]",
    cell: tuple[str, ...],
    seeds: list[int] | None,
    out: Path | None,
    sets: list[str] | None,
    track: bool,
    density: float | None = None,
) -> None:
    """Run one stage's cell in this process, exactly as DVC would."""
    from pipeline.distributed.launch import is_worker
    from pipeline.params import Params
    from pipeline.runtime.workspace import Cell, Workspace
    from pipeline.runtime.yaml_files import parse_overrides
    from stages.runner import Stage

    workspace = Workspace.here()
    overrides = parse_overrides(sets or [])
    if density is not None:
        overrides[f"tasks.{cell[1]}.density"] = density
    if overrides and out is None:
        raise ParamsError(
            "an override makes another result than the pipeline's; add --out DIR to say where it goes, "
            "or change params.yaml, or use `dvc exp run -S KEY=VALUE`"
        )
    params = Params.load(workspace.root / "params.yaml", overrides)
    stage = Stage(Cell(*cell), params, workspace, seeds=seeds or None, out=out, track=track)
    work(stage)
    if not is_worker():
        print(f"{' '.join(cell)}: wrote {stage.out}")


@app.command(rich_help_panel=PANEL)
def fetch(task: Task, out: Out = None, set_: Sets = None, mlflow: Track = True) -> None:
    """Fetch and normalise a task's data."""
    from stages import fetch as module

    run_stage(module.run, ("fetch", task), None, out, set_, mlflow)


@app.command(rich_help_panel=PANEL)
def score(task: Task, seed: Seed = None, out: Out = None, set_: Sets = None, mlflow: Track = True) -> None:
    """Score a task's parameters by Fisher information."""
    from stages import score as module

    run_stage(module.run, ("score", task), seed, out, set_, mlflow)


@app.command(rich_help_panel=PANEL)
def mask(
    task: Task,
    method: Method = "fish",
    setting: Setting = "main",
    seed: Seed = None,
    density: Density = None,
    out: Out = None,
    set_: Sets = None,
    mlflow: Track = True,
) -> None:
    """Choose the coordinates that a method trains."""
    from stages import mask as module

    run_stage(module.run, ("mask", task, method, setting), seed, out, set_, mlflow, density)


@app.command(rich_help_panel=PANEL)
def train(
    task: Task,
    method: Method = "fish",
    setting: Setting = "main",
    seed: Seed = None,
    out: Out = None,
    set_: Sets = None,
    mlflow: Track = True,
) -> None:
    """Train one cell of the table: only the coordinates of its mask."""
    from stages import train as module

    run_stage(module.run, ("train", task, method, setting), seed, out, set_, mlflow)


@app.command(rich_help_panel=PANEL)
def distribute(
    task: Task,
    method: Method = "fish",
    setting: Annotated[str, typer.Option("--setting", help="A name below distribute in params.yaml.")] = "main",
    workers: Annotated[
        int | None, typer.Option("--workers", "-w", min=1, help="Processes. [the setting's]")
    ] = None,
    every: Annotated[
        int | None, typer.Option("--every", min=0, help="Local steps between merges, 0 for none. [the setting's]")
    ] = None,
    seed: Seed = None,
    out: Out = None,
    set_: Sets = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds an exchange between workers may take.")] = 300,
    restarts: Annotated[int, typer.Option(min=0, help="Times to start the workers again after a failure.")] = 0,
    debug: Annotated[
        bool, typer.Option("--debug", help="Check that all workers are equal after each merge.")
    ] = False,
    mlflow: Track = True,
) -> None:
    """Train one cell on several workers that exchange what the mask covers.

    With other workers or local steps than the setting has, it writes beside the pipeline's results, unless --out
    says where.
    """
    from pipeline.params import Params
    from pipeline.runtime.workspace import Cell, Workspace
    from stages import distribute as module

    workspace = Workspace.here()
    own = Params.load(workspace.root / "params.yaml").at(f"distribute.{setting}")
    chosen = {"workers": workers, "every": every}
    chosen = {key: value for key, value in chosen.items() if value not in (None, getattr(own, key))}
    if chosen and out is None and not set_:
        name = "-".join([setting, *(f"{key}-{value}" for key, value in chosen.items())])
        out = workspace.out(Cell("distribute", task, method, name))
    sets = [f"distribute.{setting}.{key}={value}" for key, value in chosen.items()]
    work = partial(module.run, timeout=timeout, restarts=restarts, debug=debug)
    run_stage(work, ("distribute", task, method, setting), seed, out, [*(set_ or []), *sets], mlflow)


@app.command(rich_help_panel=PANEL)
def aggregate(out: Out = None, mlflow: Track = True) -> None:
    """Write the tables, figures and the page from all metrics."""
    from stages import aggregate as module

    run_stage(module.run, ("aggregate", "all"), None, out, None, mlflow)


@app.command("tune-lr", rich_help_panel=PANEL)
def tune_lr(
    task: Task,
    method: Annotated[list[str] | None, typer.Option("--method", "-m", help="Only this method. [all]")] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Seeds per learning rate.")] = 2,
    setting: Annotated[str, typer.Option("--setting", help="Tune at its density and examples.")] = "main",
    distribute: Annotated[
        str | None, typer.Option("--distribute", help="Tune a name below distribute, on its workers, instead.")
    ] = None,
    write: Annotated[bool, typer.Option("--write/--dry-run", help="Record the best in params.yaml.")] = True,
) -> None:
    """Find each method's learning rate on a split of train, never on the reported split."""
    from pipeline.params import Params
    from pipeline.runtime.workspace import Workspace

    workspace = Workspace.here()
    params = Params.load(workspace.root / "params.yaml")
    if distribute is not None:
        from stages import tune_workers

        tune_workers.tune(workspace, params, task, method, seeds, write, distribute)
    else:
        from stages import tune_lr as module

        module.tune(workspace, params, task, method, seeds, write, setting=setting)
