"""`fishmask submission` and `fishmask forget`: trained cells on a test split, and on each other's tasks."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import Method, Setting, Task

app = typer.Typer()
PANEL = "Experiments"


@app.command(rich_help_panel=PANEL)
def submission(
    task: Task,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the GLUE server's TSV files.")],
    method: Method = "fish",
    setting: Setting = "main",
    seed: Annotated[int, typer.Option("--seed", min=0, help="The trained seed.")] = 0,
    glue: Annotated[str | None, typer.Option("--glue", help="The task's name in GLUE. [its own]")] = None,
) -> None:
    """Write a trained cell's predictions of a GLUE test split as the server's TSV files."""
    from pipeline.errors import ParamsError, StorageError
    from pipeline.params import Params
    from pipeline.runtime.workspace import Cell, Workspace
    from pipeline.tasks.base import Task as TaskData
    from pipeline.tasks.server import write_predictions
    from pipeline.tasks.trained import trained
    from pipeline.training.device import choose_device

    workspace = Workspace.here()
    params = Params.load(workspace.root / "params.yaml")
    if task not in params.tasks:
        params.at(f"tasks.{task}")
    settings = params.tasks[task]
    data = TaskData.load(workspace.out(Cell("fetch", task)), settings.model, settings.metric)
    if data.kind != "text":
        raise ParamsError(f"tasks.{task}.kind: {data.kind}; the GLUE server takes texts")
    device = choose_device(params.device, "fp32").device
    model = trained(data, workspace.out(Cell("train", task, method, setting)), seed).to(device)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{out}: cannot make the folder: {error.strerror}") from None
    for file in write_predictions(data, model, glue or task, out, 4 * settings.train.batch_size):
        print(file)


@app.command(rich_help_panel=PANEL)
def forget(
    method: Method = "fish",
    setting: Setting = "main",
    probe: Annotated[str, typer.Option("--probe", help="The method whose head judges the other tasks.")] = "head",
) -> None:
    """Measure what training on one task costs the others, and how far it moves from the base."""
    from pipeline.params import Params
    from pipeline.runtime.workspace import Workspace
    from pipeline.tasks.forgetting import measure

    workspace = Workspace.here()
    file = measure(workspace, Params.load(workspace.root / "params.yaml"), method, setting, probe)
    print(f"wrote {file.relative_to(workspace.root)}; `fishmask aggregate` shows it")
