"""Where things lie in a project: inputs and outputs of stages, resume state, the place of the database."""

import hashlib
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pipeline.errors import ParamsError

VERSION = "0.1.0"


@dataclass(frozen=True)
class Cell:
    """One stage's unit of work: a cell of a table. Seeds run inside it."""

    stage: str
    task: str
    method: str | None = None
    setting: str | None = None

    @property
    def name(self) -> str:
        """``words``, ``words-fish`` or ``words-fish-main``."""
        return "-".join(part for part in (self.task, self.method, self.setting) if part)


@dataclass(frozen=True)
class Workspace:
    """The folders of one project.

    Attributes:
        root: the folder of params.yaml; stages read and write below it.
        home: the real project: under ``dvc exp run --temp`` the root is a passing copy, and DVC_ROOT names the
            project that outlives it. The database and resume state belong there (TRAPS D8).
    """

    root: Path
    home: Path

    @classmethod
    def here(cls) -> "Workspace":
        """Find the project around the current folder.

        Returns:
            Its workspace.

        Raises:
            ParamsError: if neither this folder nor one above it holds a params.yaml.
        """
        start = Path.cwd()
        for folder in (start, *start.parents):
            if (folder / "params.yaml").is_file():
                return cls(folder, Path(os.environ.get("DVC_ROOT", folder)))
        raise ParamsError(f"params.yaml: not found in {start} or above; run from the project's folder")

    def out(self, cell: Cell) -> Path:
        """The folder of a cell's outputs, cached by DVC."""
        if cell.stage == "aggregate":
            return self.root / "reports"
        return self.root / "artifacts" / cell.stage / cell.name

    def metrics(self, cell: Cell) -> Path:
        """The cell's metrics, kept in git."""
        return self.root / "metrics" / cell.stage / f"{cell.name}.json"

    def timing(self, cell: Cell) -> Path:
        """What the last run cost on this machine; in neither git nor DVC, since it differs every time."""
        return self.home / "timings" / cell.stage / f"{cell.name}.json"

    def resume(self, stage: str, fingerprint: str) -> Path:
        """The folder of an unfinished run's state; outside DVC's outs, which are wiped before a run (D1)."""
        return self.home / ".resume" / stage / fingerprint[:32]

    def lock(self, cell: Cell) -> Path:
        """The lock that keeps a second process off the cell's outputs."""
        return self.root / ".resume" / cell.stage / f"{cell.name}.lock"


def ranking_file(folder: Path, variant: str, examples: int) -> Path:
    """The file of one ranking in a seed's folder of the score stage; ``variant`` is empty for the task's own."""
    return folder / f"{variant}{'-' if variant else ''}examples-{examples}.safetensors"


@cache
def code_digest() -> str:
    """Digest the library's own source, so that resume state never outlives the code that wrote it.

    Returns:
        BLAKE2b-128 (hex) over the package's Python files.
    """
    state = hashlib.blake2b(digest_size=16)
    package = Path(__file__).parents[1]
    for file in sorted(package.rglob("*.py")):
        state.update(f"{file.relative_to(package)}\n".encode() + file.read_bytes())
    return state.hexdigest()
