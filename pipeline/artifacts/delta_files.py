"""A delta as a command names it: the file, or a folder that holds it with its description."""

from pathlib import Path

from pipeline.errors import ArtifactError

FILE = "delta.safetensors"


def delta_file(path: Path) -> Path:
    """Find the delta that a path names.

    Args:
        path: a delta file; or a folder with ``delta.safetensors``, as ``fishmask tune``, ``fishmask publish`` and
            the pipeline's seeds write it.

    Returns:
        The file; a path that is no folder as it is.

    Raises:
        ArtifactError: if the folder holds none.
    """
    if not path.is_dir():
        return path
    if not (path / FILE).is_file():
        raise ArtifactError(
            f"{path}: is a folder without {FILE}; name a delta file, or a folder that `fishmask tune` or "
            "`fishmask publish` wrote"
        )
    return path / FILE
