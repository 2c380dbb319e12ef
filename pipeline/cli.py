"""The command `fishmask`: parse, call, print. Every heavy import stands inside its command."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import FishmaskError, ParamsError

if TYPE_CHECKING:
    from stages.runner import Stage

app = typer.Typer(
    name="fishmask",
    help="Choose the parameters with the most Fisher information, train only those, keep a tiny exact artifact.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
profiles = typer.Typer(help="List, show or switch the profiles of params.yaml.", no_args_is_help=True)
app.add_typer(profiles, name="profile", rich_help_panel="The pipeline")
checkpoints = typer.Typer(
    help="Train with a chain of checkpoints; list, restore, squash or prune one.", no_args_is_help=True
)
app.add_typer(checkpoints, name="checkpoint", rich_help_panel="Masks and deltas")

PIPELINE, STAGES, ARTIFACTS, PROJECT = "The pipeline", "Single stages", "Masks and deltas", "This project"

Task = Annotated[str, typer.Option("--task", "-t", help="A task of params.yaml.")]
Method = Annotated[str, typer.Option("--method", "-m", help="A method of params.yaml.")]
Setting = Annotated[str, typer.Option("--setting", help="A setting of params.yaml.")]
Seed = Annotated[list[int] | None, typer.Option("--seed", help="Only this seed; repeat for several. [all]")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Write here instead of the pipeline's artifacts.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", "-S", metavar="KEY=VALUE", help="Override a key of params.yaml; needs --out."),
]
Density = Annotated[float | None, typer.Option("--density", help="Updated / all parameters; needs --out.")]
Track = Annotated[bool, typer.Option("--mlflow/--no-mlflow", help="Log to MLflow.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Run the command; an expected failure is one line on stderr and its exit code."""
    from pipeline.cpu import set_up_cpu

    set_up_cpu()
    try:
        app(prog_name="fishmask")
    except FishmaskError as error:
        print(f"fishmask: {error}", file=sys.stderr)
        raise SystemExit(error.code) from None
    except KeyboardInterrupt:
        print("fishmask: interrupted; run the same command again to go on from the saved state", file=sys.stderr)
        raise SystemExit(130) from None


def _stage(
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
    from pipeline.workspace import Cell, Workspace
    from pipeline.yaml_files import parse_overrides
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


@app.command(rich_help_panel=STAGES)
def fetch(task: Task, out: Out = None, set_: Sets = None, mlflow: Track = True) -> None:
    """Fetch and normalise a task's data."""
    from stages import fetch as module

    _stage(module.run, ("fetch", task), None, out, set_, mlflow)


@app.command(rich_help_panel=STAGES)
def score(task: Task, seed: Seed = None, out: Out = None, set_: Sets = None, mlflow: Track = True) -> None:
    """Score a task's parameters by Fisher information."""
    from stages import score as module

    _stage(module.run, ("score", task), seed, out, set_, mlflow)


@app.command(rich_help_panel=STAGES)
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

    _stage(module.run, ("mask", task, method, setting), seed, out, set_, mlflow, density)


@app.command(rich_help_panel=STAGES)
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

    _stage(module.run, ("train", task, method, setting), seed, out, set_, mlflow)


@app.command(rich_help_panel=STAGES)
def distribute(
    task: Task,
    method: Method = "fish",
    setting: Annotated[str, typer.Option("--setting", help="A name below distribute in params.yaml.")] = "main",
    workers: Annotated[int | None, typer.Option("--workers", "-w", min=1, help="Processes; needs --out.")] = None,
    every: Annotated[
        int | None, typer.Option("--every", min=0, help="Local steps between merges, 0 for none; needs --out.")
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
    """Train one cell on several workers that exchange what the mask covers."""
    from stages import distribute as module

    chosen = {"workers": workers, "every": every}
    sets = [f"distribute.{setting}.{key}={value}" for key, value in chosen.items() if value is not None]
    work = partial(module.run, timeout=timeout, restarts=restarts, debug=debug)
    _stage(work, ("distribute", task, method, setting), seed, out, [*(set_ or []), *sets], mlflow)


@app.command(rich_help_panel=STAGES)
def aggregate(out: Out = None, mlflow: Track = True) -> None:
    """Write the tables, figures and the page from all metrics."""
    from stages import aggregate as module

    _stage(module.run, ("aggregate", "all"), None, out, None, mlflow)


@app.command("tune-lr", rich_help_panel=STAGES)
def tune_lr(
    task: Task,
    method: Annotated[list[str] | None, typer.Option("--method", "-m", help="Only this method. [all]")] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Seeds per learning rate.")] = 2,
    write: Annotated[bool, typer.Option("--write/--dry-run", help="Record the best in params.yaml.")] = True,
) -> None:
    """Find each method's learning rate on a split of train, never on the reported split."""
    from pipeline.params import Params
    from pipeline.workspace import Workspace
    from stages.tune_lr import tune

    workspace = Workspace.here()
    tune(workspace, Params.load(workspace.root / "params.yaml"), task, method, seeds, write)


@app.command(rich_help_panel=PIPELINE)
def demo() -> None:
    """Run the embedded default end to end and print its table."""
    from pipeline import project

    project.repro([])
    project.print_results()


@app.command(rich_help_panel=PIPELINE, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def repro(context: typer.Context) -> None:
    """Run `dvc repro` with this interpreter; takes DVC's own arguments."""
    from pipeline import project

    project.repro(context.args)


@app.command(rich_help_panel=PIPELINE)
def plan(as_json: AsJson = False) -> None:
    """Show what `repro` would run and what it cost here the last time."""
    from pipeline import project

    project.print_plan(as_json)


@profiles.command("list")
def profile_list(as_json: AsJson = False) -> None:
    """List the profiles; a star marks the one in use."""
    from pipeline import project

    names = project.profile_names()
    current = project.current_profile()
    if as_json:
        print(json.dumps({"profiles": names, "current": current}))
    else:
        print("\n".join(f"{'*' if name == current else ' '} {name}" for name in names))


@profiles.command("show")
def profile_show(name: str) -> None:
    """Print a profile."""
    from pipeline import project

    print(project.profile_text(name), end="")


@profiles.command("use")
def profile_use(
    name: str,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a params.yaml that was edited.")] = False,
) -> None:
    """Make a profile the project's params.yaml."""
    from pipeline import project

    project.switch_profile(name, force=force)
    print(f"params.yaml is now the '{name}' profile")


@app.command(rich_help_panel=ARTIFACTS)
def inspect(
    file: Path,
    base: Annotated[
        str | None, typer.Option("--base", help="The base model, to measure a delta's change against.")
    ] = None,
    depth: Annotated[
        int | None, typer.Option("--depth", min=1, help="Name parts to group tensors by. [as many as fit]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a mask, ranking or delta file holds, layer by layer."""
    from pipeline import inspection

    inspection.show(inspection.describe(file, base), depth, as_json)


@app.command(rich_help_panel=ARTIFACTS)
def verify(
    paths: Annotated[list[Path] | None, typer.Argument(help="Files or folders. [all that dvc.lock names]")] = None,
    as_json: AsJson = False,
) -> None:
    """Check files against their checksums, and the whole project against dvc.lock."""
    from pipeline import verification

    verification.verify(paths or [], as_json)


_MODEL = "a safetensors file, shards with an index, or a model folder"
Base = Annotated[str, typer.Option("--base", help=f"The base model: {_MODEL}.")]
Tuned = Annotated[str, typer.Argument(help=f"The tuned model: {_MODEL}.")]
Result = Annotated[Path, typer.Option("--out", "-o", help="Where the new model goes.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what stands at --out.")]


@app.command(rich_help_panel=ARTIFACTS)
def apply(delta: Path, base: Base, out: Result, force: Force = False, as_json: AsJson = False) -> None:
    """Write base + delta as a new model, bit for bit what was trained."""
    from pipeline import application

    application.apply(delta, base, out, force=force).show(as_json)


@app.command(rich_help_panel=ARTIFACTS)
def revert(
    delta: Path,
    tuned: Tuned,
    out: Result,
    base: Annotated[
        str | None, typer.Option("--base", help="The base, where the delta keeps no values of it.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write the base again, from a tuned model and its delta."""
    from pipeline import application

    application.revert(delta, tuned, out, base, force=force).show(as_json)


@app.command(rich_help_panel=ARTIFACTS)
def diff(
    base: Annotated[str, typer.Argument(help=f"The base model: {_MODEL}.")],
    tuned: Tuned,
    out: Annotated[Path, typer.Option("--out", "-o", help="The delta file to write.")],
    keep_base: Annotated[bool, typer.Option("--keep-base", help="Make it revertible without the base.")] = False,
    thin: Annotated[bool, typer.Option("--thin", help="Smaller; cannot be read without the base.")] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write the exact delta of two models of equal shapes: wherever a bit differs."""
    from pipeline import difference

    difference.diff(base, tuned, out, keep_base=keep_base, thin=thin, force=force).show(as_json)


@app.command(rich_help_panel=ARTIFACTS)
def compose(
    deltas: Annotated[list[Path], typer.Argument(help="Deltas of one base.")],
    base: Base,
    out: Annotated[Path, typer.Option("--out", "-o", help="The delta file to write.")],
    method: Annotated[str, typer.Option("--method", "-m", help="add, ties or dare.")] = "add",
    weight: Annotated[
        list[float] | None, typer.Option("--weight", "-w", help="Of each delta in turn, or one for all. [1]")
    ] = None,
    density: Annotated[float | None, typer.Option("--density", help="ties: share of changes kept. [0.2]")] = None,
    drop: Annotated[float | None, typer.Option("--drop", help="dare: share of changes dropped. [0.9]")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="dare: of the draws. [0]")] = None,
    head: Annotated[int | None, typer.Option("--head", help="Take the head from this delta, from 0.")] = None,
    buffers: Annotated[str, typer.Option("--buffers", help="equal, base, or this delta's, from 0.")] = "equal",
    report: Annotated[bool, typer.Option("--report", help="Show overlaps and conflicts, too.")] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Compose deltas of one base into one: a weighted sum, TIES or DARE."""
    from pipeline import composition

    done = composition.compose(
        deltas, base, out, method, weights=weight, density=density, drop=drop, seed=seed, head=head,
        buffers=buffers, report=report, force=force,
    )  # fmt: skip
    done.show(as_json)
    if report and not as_json:
        composition.show_overlap(done.facts["overlap"])


@app.command(rich_help_panel=ARTIFACTS)
def export(
    delta: Path,
    base: Base,
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder for dense and peft, else a file.")],
    to: Annotated[str, typer.Option("--to", help="dense, peft, git-theta or vllm.")],
    whole: Annotated[bool, typer.Option("--whole", help="peft: keep modules whole where it must be.")] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write a delta for another tool: a dense model, PEFT, git-theta or vLLM."""
    from pipeline import exporting

    exporting.export(delta, base, to, out, whole=whole, force=force).show(as_json)


@checkpoints.command("run")
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

    _stage(module.run, ("checkpoint", task, method, setting), seed, out, set_, mlflow)


@checkpoints.command("list")
def checkpoint_list(folder: Path, as_json: AsJson = False) -> None:
    """Show the steps of a chain and their bytes, against dense checkpoints."""
    from pipeline import chains

    chains.show(chains.describe(folder), as_json)


@checkpoints.command("restore")
def checkpoint_restore(
    folder: Path,
    out: Annotated[Path, typer.Option("--out", "-o", help="A .safetensors file, or a new model folder.")],
    step: Annotated[int, typer.Option("--step", help="0 is the base, -1 the newest.")] = -1,
    base: Annotated[str | None, typer.Option("--base", help="The base, where the chain keeps none.")] = None,
) -> None:
    """Write any state of a chain as a model, bit for bit."""
    from pipeline import chains

    print(chains.restore(folder, step, out, base))


@checkpoints.command("squash")
def checkpoint_squash(folder: Path, first: int, last: int) -> None:
    """Join the steps FIRST to LAST into one; the states between them go."""
    from pipeline import chains

    print(chains.squash(folder, first, last))


@checkpoints.command("prune")
def checkpoint_prune(
    folder: Path,
    keep: Annotated[int | None, typer.Option("--keep", min=1, help="Keep the newest so many steps.")] = None,
    step: Annotated[list[int] | None, typer.Option("--step", help="Keep this step; repeat for several.")] = None,
) -> None:
    """Drop steps; those kept restore as before."""
    from pipeline import chains

    print(chains.prune(folder, keep, step or []))


@app.command(rich_help_panel=PROJECT)
def doctor(as_json: AsJson = False) -> None:
    """Show the device and why, versions, disk, and the database."""
    from pipeline import project

    project.print_doctor(as_json)


@app.command(rich_help_panel=PROJECT)
def ui(
    port: Annotated[int, typer.Option(help="Port on loopback.")] = 5000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
) -> None:
    """Open MLflow on this project's runs."""
    from pipeline.tracking import ui as serve
    from pipeline.workspace import Workspace

    raise typer.Exit(serve(Workspace.here().home, port=port, host=host))


@app.command(rich_help_panel=PROJECT)
def why(
    cell: Annotated[str, typer.Argument(help="A cell such as words-fish-main.")], as_json: AsJson = False
) -> None:
    """Trace a number: cell, seeds, artifact hashes, MLflow run, commit."""
    from pipeline import project

    project.print_why(cell, as_json)


def _version(wanted: bool) -> None:
    if wanted:
        from pipeline.workspace import VERSION

        print(f"fishmask {VERSION}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


if __name__ == "__main__":
    main()
