"""What an artifact file holds, and whether every byte of it is as it was written."""

import json
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from pipeline.deltas.delta import Delta
from pipeline.errors import ArtifactError
from pipeline.files import format_of
from pipeline.masks.mask import Mask
from pipeline.masks.ranking import Ranking

_READERS: dict[str, Callable[[Path], Mask | Delta | Ranking]] = {
    "fishmask-mask": Mask.load,
    "fishmask-delta": Delta.load,
    "fishmask-ranking": Ranking.load,
}
_BAR = 24  # characters of the longest bar


def load(path: Path) -> Mask | Delta | Ranking:
    """Read a mask, delta or ranking, whichever the file is.

    Returns:
        The artifact, every checksum verified.

    Raises:
        ArtifactError: if the file is corrupt, or of none of these formats.
    """
    found = format_of(path)
    if found not in _READERS:
        raise ArtifactError(f"{path}: is a {found} file; expected one of {', '.join(_READERS)}")
    return _READERS[found](path)


def describe(path: Path) -> dict[str, Any]:
    """Describe an artifact file.

    Returns:
        Identity, size and provenance, and ``layers``: one row a tensor that has coordinates.
    """
    artifact = load(path)
    facts: dict[str, Any] = {"file": str(path), "format": format_of(path), "bytes": path.stat().st_size}
    facts |= {"digest": artifact.digest, "info": artifact.info}
    if isinstance(artifact, Ranking):
        rows = [{"name": n, "count": s["count"], "size": prod(artifact.index.shapes[n])} | s
                for n, s in artifact.summary.items()]  # fmt: skip
        return facts | {"coordinates": artifact.nnz, "parameters": artifact.index.total, "layers": rows}
    mask = artifact if isinstance(artifact, Mask) else artifact.mask
    facts |= {"coordinates": mask.nnz, "parameters": mask.index.total, "density": mask.density}
    if isinstance(artifact, Delta):
        facts |= {
            "mask": mask.digest,
            "base": artifact.base,
            "values": artifact.nbytes,
            "keeps base": artifact.known.values is not None,
            "buffers": {name: list(b.shape) for name, b in artifact.buffers.items()},
        }
        return facts | {"layers": [row for row in artifact.summary() if row["count"]]}
    layers = [
        {"name": n, "count": mask.count(n), "size": mask.index.numel(n)} for n in mask.index if mask.count(n)
    ]
    return facts | {"layers": layers}


def show(facts: dict[str, Any], as_json: bool) -> None:
    """Print a description: JSON, or a table with a bar for each tensor's share of the coordinates."""
    if as_json:
        print(json.dumps(facts))
        return
    layers = facts.pop("layers")
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name}={entry}" for name, entry in value.items()) or "none"
        print(f"{key:<12} {value:.6g}" if isinstance(value, float) else f"{key:<12} {value}")
    most = max((row["count"] for row in layers), default=1)
    table = Table(Column("tensor", no_wrap=True), "chosen", "of", "density", "share of the mask")
    for row in layers:
        bar = "█" * max(1, round(_BAR * row["count"] / most))
        share = row["count"] / row["size"]
        table.add_row(row["name"], f"{row['count']:,}", f"{row['size']:,}", f"{share:.3%}", bar)
    console = Console()
    console.print(table, width=max(console.width, 130), crop=False)


def verify(paths: Iterable[Path], as_json: bool) -> None:
    """Verify files, and every ``.safetensors`` file below folders; foreign safetensors files are passed over.

    Raises:
        ArtifactError: if any file is damaged; each is named on a line of its own before.
    """
    rows: list[dict[str, Any]] = []
    for path in paths:
        if not path.exists():
            raise ArtifactError(f"{path}: no such file or folder")
        for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
            try:
                rows.append({"file": str(file), "ok": True, "digest": load(file).digest})
            except ArtifactError as error:
                rows.append({"file": str(file), "ok": False, "reason": str(error)})
    bad = [row for row in rows if not row["ok"]]
    if as_json:
        print(json.dumps({"files": rows, "damaged": len(bad)}))
    else:
        for row in rows:
            print(f"ok      {row['digest'][:16]}  {row['file']}" if row["ok"] else f"DAMAGED {row['reason']}")
    if bad:
        raise ArtifactError(f"{len(bad)} of {len(rows)} files are damaged, the first: {bad[0]['file']}")
    if not rows:
        raise ArtifactError(f"no .safetensors file in {', '.join(map(str, paths))}")
