"""`fishmask inspect|verify|apply|revert|swap|diff|compose|export`: masks and deltas as files."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import AsJson, Force

app = typer.Typer()
PANEL = "Masks and deltas"


@app.command(rich_help_panel=PANEL)
def inspect(
    file: Annotated[Path, typer.Argument(help="A mask, ranking or delta; a tuned or published folder; a chain.")],
    base: Annotated[
        str | None, typer.Option("--base", help="The base model, to measure a delta's change against.")
    ] = None,
    depth: Annotated[
        int | None, typer.Option("--depth", min=1, help="Name parts to group tensors by. [as many as fit]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a mask, ranking or delta file holds, layer by layer."""
    from pipeline.artifacts import inspection
    from pipeline.artifacts.delta_files import FILE, delta_file

    named = delta_file(file) if (file / FILE).is_file() else file  # a chain is a folder, too
    inspection.show(inspection.describe(named, base), depth, as_json)


@app.command(rich_help_panel=PANEL)
def verify(
    paths: Annotated[list[Path] | None, typer.Argument(help="Files or folders. [all that dvc.lock names]")] = None,
    as_json: AsJson = False,
) -> None:
    """Check files against their checksums, and the whole project against dvc.lock."""
    from pipeline.artifacts import verification

    verification.verify(paths or [], as_json)


_MODEL = "a safetensors file, shards with an index, or a model folder"
Base = Annotated[str, typer.Option("--base", help=f"The base model: {_MODEL}.")]
Delta = Annotated[Path, typer.Argument(help="A delta file, or a tuned or published folder.")]
Tuned = Annotated[str, typer.Argument(help=f"The tuned model: {_MODEL}.")]
Thin = Annotated[bool, typer.Option("--thin", help="Smaller; cannot be read without the base.")]
Result = Annotated[Path, typer.Option("--out", "-o", help="Where the new model goes.")]


@app.command(rich_help_panel=PANEL)
def apply(delta: Delta, base: Base, out: Result, force: Force = False, as_json: AsJson = False) -> None:
    """Write base + delta as a new model, bit for bit what was trained."""
    from pipeline.artifacts import application
    from pipeline.artifacts.delta_files import delta_file

    application.apply(delta_file(delta), base, out, force=force).show(as_json)


@app.command(rich_help_panel=PANEL)
def revert(
    delta: Delta,
    tuned: Tuned,
    out: Result,
    base: Annotated[
        str | None, typer.Option("--base", help="The base, where the delta keeps no values of it.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write the base again, from a tuned model and its delta."""
    from pipeline.artifacts import application
    from pipeline.artifacts.delta_files import delta_file

    application.revert(delta_file(delta), tuned, out, base, force=force).show(as_json)


@app.command(rich_help_panel=PANEL)
def swap(
    deltas: Annotated[list[Path], typer.Argument(help="Deltas of one base: files, or tuned folders.")],
    base: Base,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="How often to go through all of them.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Hold one base in memory, become each variant in turn, check every bit, and time it against reloading."""
    import json

    from pipeline.artifacts import swapping
    from pipeline.artifacts.delta_files import delta_file

    facts = swapping.rehearse([delta_file(delta) for delta in deltas], base, rounds=rounds)
    print(json.dumps(facts)) if as_json else swapping.show(facts)


@app.command(rich_help_panel=PANEL)
def diff(
    base: Annotated[str, typer.Argument(help=f"The base model: {_MODEL}.")],
    tuned: Tuned,
    out: Annotated[Path, typer.Option("--out", "-o", help="The delta file to write.")],
    keep_base: Annotated[bool, typer.Option("--keep-base", help="Make it revertible without the base.")] = False,
    thin: Thin = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write the exact delta of two models of equal shapes: wherever a bit differs."""
    from pipeline.artifacts import difference

    difference.diff(base, tuned, out, keep_base=keep_base, thin=thin, force=force).show(as_json)


@app.command(rich_help_panel=PANEL)
def compose(
    deltas: Annotated[list[Path], typer.Argument(help="Deltas of one base: files, or tuned folders.")],
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
    thin: Thin = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Compose deltas of one base into one: a weighted sum, TIES or DARE."""
    from pipeline.artifacts import composition
    from pipeline.artifacts.delta_files import delta_file

    done = composition.compose(
        [delta_file(delta) for delta in deltas], base, out, method, weights=weight, density=density, drop=drop,
        seed=seed, head=head, buffers=buffers, report=report, thin=thin, force=force,
    )  # fmt: skip
    done.show(as_json)
    if report and not as_json:
        composition.show_overlap(done.facts["overlap"])


@app.command(rich_help_panel=PANEL)
def export(
    delta: Delta,
    base: Base,
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder for dense and peft, else a file.")],
    to: Annotated[str, typer.Option("--to", help="dense, peft, git-theta or vllm.")],
    whole: Annotated[bool, typer.Option("--whole", help="peft: keep modules whole where it must be.")] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write a delta for another tool: a dense model, PEFT, git-theta or vLLM."""
    from pipeline.artifacts import exporting
    from pipeline.artifacts.delta_files import delta_file

    exporting.export(delta_file(delta), base, to, out, whole=whole, force=force).show(as_json)
