"""`fishmask profile list|show|use|new`: the profiles of params.yaml."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import AsJson

app = typer.Typer(help="List, show, switch or make the profiles of params.yaml.", no_args_is_help=True)


@app.command("list")
def profile_list(as_json: AsJson = False) -> None:
    """List the profiles; a star marks the one in use."""
    from pipeline import profiles

    names = profiles.names()
    current = profiles.current()
    if as_json:
        print(json.dumps({"profiles": names, "current": current}))
    else:
        print("\n".join(f"{'*' if name == current else ' '} {name}" for name in names))


@app.command("show")
def profile_show(name: str) -> None:
    """Print a profile."""
    from pipeline import profiles

    print(profiles.text_of(name), end="")


@app.command("use")
def profile_use(
    name: str,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a params.yaml that was edited.")] = False,
) -> None:
    """Make a profile the project's params.yaml."""
    from pipeline import profiles

    profiles.switch(name, force=force)
    print(f"params.yaml is now the '{name}' profile")


@app.command("new")
def profile_new(
    from_tune: Annotated[Path, typer.Option("--from-tune", help="A folder that `fishmask tune --out` wrote.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite a params.yaml that was edited.")] = False,
) -> None:
    """Make a tuned folder the project's params.yaml: the same run through DVC, with the same result."""
    from pipeline.tuning.project import new_profile

    print(new_profile(from_tune, force=force))
