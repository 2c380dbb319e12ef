"""The profiles that ship with the package: whole params.yaml files, to be listed, read and switched to."""

from importlib.resources import files

from pipeline.errors import ParamsError, unknown
from pipeline.files import write_bytes
from pipeline.runtime.workspace import Workspace
from pipeline.runtime.yaml_files import read_yaml


def names() -> list[str]:
    """Name the profiles that ship with the package."""
    return sorted(
        entry.name[:-5] for entry in files("pipeline.profiles").iterdir() if entry.name.endswith(".yaml")
    )


def text_of(name: str) -> str:
    """The text of a profile."""
    if name not in names():
        raise ParamsError(f"profile: unknown {unknown(name, names())}")
    return files("pipeline.profiles").joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def current() -> str | None:
    """The profile that params.yaml says it is."""
    value = read_yaml(Workspace.here().root / "params.yaml").get("profile")
    return str(value) if value else None


def switch(name: str, *, force: bool = False) -> None:
    """Make a profile the project's params.yaml; edits that no profile holds are kept unless forced.

    Raises:
        ParamsError: if params.yaml was edited and ``force`` is not given.
    """
    text, file = text_of(name), Workspace.here().root / "params.yaml"
    present = file.read_text(encoding="utf-8")
    if present == text:
        return
    if not force and present not in {text_of(other) for other in names()}:
        raise ParamsError("params.yaml: edited since its profile was set; commit or copy it, then add --force")
    write_bytes(file, text.encode())
