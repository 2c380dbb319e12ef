"""`fishmask demo|repro|plan`: the whole pipeline."""

import typer

from pipeline.commands.options import AsJson

app = typer.Typer()
PANEL = "The pipeline"


@app.command(rich_help_panel=PANEL)
def demo() -> None:
    """Run the embedded default end to end and print its table."""
    from pipeline import project

    project.repro([])
    project.print_results()


@app.command(rich_help_panel=PANEL, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def repro(context: typer.Context) -> None:
    """Run `dvc repro` with this interpreter; takes DVC's own arguments."""
    from pipeline import project

    project.repro(context.args)


@app.command(rich_help_panel=PANEL)
def plan(as_json: AsJson = False) -> None:
    """Show what `repro` would run and what it cost here the last time."""
    from pipeline import project

    project.print_plan(as_json)
