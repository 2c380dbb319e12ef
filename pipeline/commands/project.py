"""`fishmask doctor|ui|why`: this machine, its runs, and where a number comes from."""

from typing import Annotated

import typer

from pipeline.commands.options import AsJson

app = typer.Typer()
PANEL = "This project"


@app.command(rich_help_panel=PANEL)
def doctor(as_json: AsJson = False) -> None:
    """Show the device and why, versions, disk, and the database."""
    from pipeline.doctor import print_doctor

    print_doctor(as_json)


@app.command(rich_help_panel=PANEL)
def ui(
    port: Annotated[int, typer.Option(help="Port on loopback.")] = 5000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
) -> None:
    """Open MLflow on this project's runs."""
    from pipeline.runtime.workspace import Workspace
    from pipeline.tracking import ui as serve

    raise typer.Exit(serve(Workspace.here().home, port=port, host=host))


@app.command(rich_help_panel=PANEL)
def why(
    cell: Annotated[str, typer.Argument(help="A cell such as words-fish-main, or STAGE/CELL.")],
    as_json: AsJson = False,
) -> None:
    """Trace a number: cell, seeds, artifact hashes, MLflow run, commit."""
    from pipeline.why import print_why

    print_why(cell, as_json)
