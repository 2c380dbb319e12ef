"""The options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Task = Annotated[str, typer.Option("--task", "-t", help="A task of params.yaml.")]
Method = Annotated[str, typer.Option("--method", "-m", help="A method of params.yaml.")]
Setting = Annotated[str, typer.Option("--setting", help="A setting of params.yaml.")]
Seed = Annotated[list[int] | None, typer.Option("--seed", min=0, help="Only this seed; repeat for several. [all]")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Write here instead of the pipeline's artifacts.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", "-S", metavar="KEY=VALUE", help="Override a key of params.yaml; needs --out."),
]
Density = Annotated[float | None, typer.Option("--density", help="Updated / all parameters; needs --out.")]
Track = Annotated[bool, typer.Option("--mlflow/--no-mlflow", help="Log to MLflow.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what stands at --out.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
