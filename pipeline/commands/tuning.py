"""`fishmask tune`: your model, your data."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import AsJson, Track

app = typer.Typer()
PANEL = "Your model, your data"


@app.command(rich_help_panel=PANEL)
def tune(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="A model folder, a hub id, package:NAME, torchvision:NAME@FILE or timm:NAME@FILE."
        ),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option("--train", help="csv, tsv, json, jsonl or parquet (.gz too), images by folder, or a hub id."),
    ] = None,
    validation: Annotated[
        str | None, typer.Option("--validation", help="Likewise. [a fifth of train, held out]")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", help="A column of texts; twice for pairs; the prompt. [guessed]")
    ] = None,
    label: Annotated[str | None, typer.Option("--label", help="The column to predict. [guessed]")] = None,
    objective: Annotated[
        str | None, typer.Option("--objective", help="classification, regression or completion. [by the label]")
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", help="What it is judged by. [accuracy, pearson]")
    ] = None,
    density: Annotated[float, typer.Option("--density", help="Updated / all parameters.")] = 0.005,
    dense: Annotated[bool, typer.Option("--dense", help="Also train every parameter, to compare.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="[3 to 12, by the rows]")] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Time for all training, such as 10m; fits the epochs.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="[16; 8 for completions]")] = None,
    lr: Annotated[
        float | None, typer.Option("--lr", help="Fish's learning rate. [searched on a part of train]")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=1, help="Tokens of a text. [the model's limit]")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", min=1, help="Pixels of a side. [the model's]")
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Of hub ids.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the task. [the folder's]")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads. [all]")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")] = "auto",
    precision: Annotated[str, typer.Option("--precision", help="auto, fp32 or bf16.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run of --out.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a tuned model, or start anew.")] = False,
    mlflow: Track = True,
    as_json: AsJson = False,
) -> None:
    """Fine-tune your model on your data: a small exact delta, its model card, and how good it is."""
    from pipeline.tuning.plan import Asked
    from pipeline.tuning.report import show
    from pipeline.tuning.tune import tune as run

    asked = Asked(
        model=model, train=train, validation=validation, text=tuple(text or ()), label=label, objective=objective,
        metric=metric, density=density, dense=dense, seed=seed, epochs=epochs, batch_size=batch_size, lr=lr,
        max_length=max_length, image_size=image_size, budget=budget, revision=revision, name=name, threads=threads,
        device=device, precision=precision,
    )  # fmt: skip
    result = run(asked, out, resume=resume, force=force, track=mlflow)
    if as_json:
        print(json.dumps(result.tuned.model_dump()))
    else:
        show(result)
