"""`fishmask checkpoint run|list|restore|squash|prune`: chains of sparse checkpoints."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import AsJson, Force, Method, Out, Seed, Sets, Task, Track
from pipeline.commands.stages import run_stage

app = typer.Typer(
    help="Train with a chain of checkpoints; list, restore, squash or prune one.", no_args_is_help=True
)


@app.command("run")
def checkpoint_run(
    task: Task,
    setting: Annotated[str, typer.Option("--setting", help="A name below checkpoints in params.yaml.")],
    method: Method = "fish",
    seed: Seed = None,
    out: Out = None,
    set_: Sets = None,
    mlflow: Track = True,
) -> None:
    """Train one cell of Table 4, whose every epoch is a step of a chain."""
    from stages import checkpoint as module

    run_stage(module.run, ("checkpoint", task, method, setting), seed, out, set_, mlflow)


@app.command("list")
def checkpoint_list(folder: Path, as_json: AsJson = False) -> None:
    """Show the steps of a chain and their bytes, against dense checkpoints."""
    from pipeline.artifacts import chains

    chains.show(chains.describe(folder), as_json)


@app.command("restore")
def checkpoint_restore(
    folder: Path,
    out: Annotated[Path, typer.Option("--out", "-o", help="A .safetensors file, or a model folder.")],
    step: Annotated[int, typer.Option("--step", help="0 is the base, -1 the newest.")] = -1,
    base: Annotated[str | None, typer.Option("--base", help="The base, where the chain keeps none.")] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write any state of a chain as a model, bit for bit."""
    from pipeline.artifacts import chains

    chains.restore(folder, step, out, base, force=force).show(as_json)


@app.command("squash")
def checkpoint_squash(folder: Path, first: int, last: int) -> None:
    """Join the steps FIRST to LAST into one; the states between them go."""
    from pipeline.artifacts import chains

    print(chains.squash(folder, first, last))


@app.command("prune")
def checkpoint_prune(
    folder: Path,
    keep: Annotated[int | None, typer.Option("--keep", min=1, help="Keep the newest so many steps.")] = None,
    step: Annotated[list[int] | None, typer.Option("--step", help="Keep this step; repeat for several.")] = None,
) -> None:
    """Drop steps; those kept restore as before."""
    from pipeline.artifacts import chains

    print(chains.prune(folder, keep, step or []))
