"""`fishmask predict|evaluate|register|publish`: what a delta is for."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import AsJson

app = typer.Typer()
PANEL = "Your model, your data"

Deltas = Annotated[
    list[str],
    typer.Option(
        "--delta", "-d", metavar="[NAME=]PATH", help="A delta file, or a tuned or published folder; or several."
    ),
]
Base = Annotated[str | None, typer.Option("--base", "-b", help="The base model. [the one the delta names]")]
Input = Annotated[
    str, typer.Option("--input", "-i", help="csv, tsv, json, jsonl or parquet (.gz too), images, or a hub id.")
]
Text = Annotated[
    list[str] | None, typer.Option("--text", help="A column to read, twice for pairs. [as the delta was tuned]")
]
MaxLength = Annotated[int | None, typer.Option("--max-length", min=1, help="Tokens to cut texts to.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Rows that are computed together.")]
NewTokens = Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Of a completion. [64 at most]")]
Device = Annotated[str, typer.Option("--device", help="auto, cuda, mps or cpu.")]
Precision = Annotated[str, typer.Option("--precision", help="auto, fp32 or bf16.")]


@app.command(rich_help_panel=PANEL)
def predict(
    delta: Deltas,
    input_: Input,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file to write; its extension says the format. [csv, printed]"),
    ] = None,
    base: Base = None,
    text: Text = None,
    max_length: MaxLength = None,
    max_new_tokens: NewTokens = None,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    precision: Precision = "auto",
    only: Annotated[bool, typer.Option("--only", help="Write the answers without the input's columns.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what stands at --out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Answer every row of a file: classes and probabilities, numbers, or completions."""
    from pipeline.serving import predicting

    done = predicting.predict(
        delta, input_, out, base=base, text=text or (), only=only, force=force, max_length=max_length,
        max_new_tokens=max_new_tokens, batch_size=batch_size, device=device, precision=precision,
    )  # fmt: skip
    if done is not None:
        done.show(as_json)


@app.command(rich_help_panel=PANEL)
def evaluate(
    delta: Deltas,
    input_: Input,
    base: Base = None,
    text: Text = None,
    label: Annotated[
        str | None, typer.Option("--label", help="The column of labels. [as the delta was tuned]")
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", help="What to score by. [as the delta was tuned]")
    ] = None,
    max_length: MaxLength = None,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    precision: Precision = "auto",
    as_json: AsJson = False,
) -> None:
    """Score deltas on rows with their labels."""
    from pipeline.serving import evaluating

    results = evaluating.evaluate(
        delta, input_, base=base, text=text or (), label=label, metric=metric, max_length=max_length,
        batch_size=batch_size, device=device, precision=precision,
    )  # fmt: skip
    evaluating.show(results, as_json)


@app.command(rich_help_panel=PANEL)
def register(
    delta: Annotated[
        list[str], typer.Argument(metavar="[NAME=]PATH...", help="A delta file, or a tuned folder; or several.")
    ],
    name: Annotated[
        str, typer.Option("--name", "-n", help="Of the registered model; a new version if it exists.")
    ],
    base: Base = None,
    text: Text = None,
    max_length: MaxLength = None,
    example: Annotated[
        str | None, typer.Option("--example", help="Rows whose first are the input example.")
    ] = None,
    alias: Annotated[str | None, typer.Option("--alias", help="Move this alias to the new version.")] = None,
    max_new_tokens: NewTokens = None,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    precision: Precision = "auto",
    as_json: AsJson = False,
) -> None:
    """Register a delta in MLflow, to be served by `mlflow models serve`: code over safetensors, no pickle."""
    from pipeline.serving import registry

    registry.register(
        delta, name, base=base, text=text or (), max_length=max_length, example=example, alias=alias,
        max_new_tokens=max_new_tokens, batch_size=batch_size, device=device, precision=precision,
    ).show(as_json)  # fmt: skip


@app.command(rich_help_panel=PANEL)
def publish(
    delta: Annotated[Path, typer.Argument(help="A delta file, or a tuned folder.")],
    to: Annotated[Path, typer.Option("--to", help="The folder to write.")],
    base: Annotated[
        str | None,
        typer.Option("--base", "-b", help="What others find the base by: a hub id. [as the delta names it]"),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", "-n", help="Of the model. [the task's]")] = None,
    licence: Annotated[str | None, typer.Option("--license", help="Its identifier, such as apache-2.0.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what stands at --to.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a folder for a model hub: the delta, its description, a model card with scores and provenance."""
    from pipeline.serving import publishing

    publishing.publish(delta, to, base=base, name=name, licence=licence, force=force).show(as_json)
