"""Where a number comes from: the git commit, whether the tree matched it, and the hashes of a cell's inputs."""

import subprocess
from pathlib import Path
from typing import Any

# What the pipeline itself writes while it runs: a change there is none of the code or the settings.
_WRITTEN = (":(exclude,top)metrics", ":(exclude,top)dvc.lock", ":(exclude,top)reports")


def git_tags(root: Path) -> dict[str, str]:
    """Describe the source tree.

    Args:
        root: a folder inside the repository.

    Returns:
        ``git.commit`` (40 hex digits, absent before the first commit) and ``git.dirty`` (``true`` when a file
        other than the pipeline's own metrics and lock differs from that commit or is untracked). Empty outside a
        repository.
    """
    status = _git(root, "status", "--porcelain", "--untracked-files=normal", "--", ":(top)", *_WRITTEN)
    if status is None:
        return {}
    commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    return ({"git.commit": commit} if commit else {}) | {"git.dirty": str(bool(status)).lower()}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments], cwd=root, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def dvc_tags(root: Path, stage: str, cell: str) -> dict[str, str]:
    """Look the hashes of a cell's inputs up in ``dvc.lock``.

    The lock's entry of the running stage is from its previous run, so each hash is taken from the stage that wrote
    the file. Before a first run there is no entry: then the inputs are the outputs of the cells that this one
    extends (``words`` and ``words-fish`` for ``words-fish-main``).

    Args:
        root: the folder of dvc.lock.
        stage: the stage's name.
        cell: the cell's name.

    Returns:
        ``dvc.<path>`` -> hash, for inputs that a stage of this pipeline wrote. Empty without a readable lock.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        stages: dict[str, Any] = YAML(typ="safe").load(root / "dvc.lock")["stages"]
    except (OSError, YAMLError, KeyError, TypeError):
        return {}
    written = {
        out["path"]: (name, str(out.get("md5") or out.get("hash") or ""))
        for name, entry in stages.items()
        for out in entry.get("outs", ())
    }
    own = stages.get(f"{stage}@{cell}") or stages.get(stage)
    if own is not None:
        inputs = [dep["path"] for dep in own.get("deps", ()) if dep["path"] in written]
    else:
        inputs = [
            path for path, (name, _) in written.items() if f"{cell}-".startswith(f"{name.partition('@')[2]}-")
        ]
    return {f"dvc.{path}": written[path][1] for path in sorted(inputs)}
