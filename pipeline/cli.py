"""The command `fishmask`: parse, call, print. Every heavy import stands inside its command."""

import sys
from typing import Annotated

import typer

from pipeline.commands import artifacts, checkpoints, glue, pipeline, profiles, project, serving, stages, tuning
from pipeline.errors import FishmaskError

app = typer.Typer(
    name="fishmask",
    help="Choose the parameters with the most Fisher information, train only those, keep a tiny exact artifact.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(pipeline.app)
app.add_typer(profiles.app, name="profile", rich_help_panel="The pipeline")
app.add_typer(tuning.app)
app.add_typer(stages.app)
app.add_typer(artifacts.app)
app.add_typer(checkpoints.app, name="checkpoint", rich_help_panel="Masks and deltas")
app.add_typer(serving.app)
app.add_typer(glue.app)
app.add_typer(project.app)


def main() -> None:
    """Run the command; an expected failure is one line on stderr and its exit code."""
    from pipeline.runtime.cpu import set_up_cpu

    set_up_cpu()
    try:
        app(prog_name="fishmask")
    except FishmaskError as error:
        print(f"fishmask: {error}", file=sys.stderr)
        raise SystemExit(error.code) from None
    except KeyboardInterrupt:
        print("fishmask: interrupted; run the same command again to go on from the saved state", file=sys.stderr)
        raise SystemExit(130) from None


def _version(wanted: bool) -> None:
    if wanted:
        from pipeline.runtime.workspace import VERSION

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
