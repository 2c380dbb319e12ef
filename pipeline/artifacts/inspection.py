"""What an artifact file holds: identity, provenance, bytes by kind, and what it changes layer by layer."""

import json
import sys
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from pipeline.artifacts import application, chains, chart
from pipeline.deltas.delta import Delta
from pipeline.errors import ArtifactError, ParamsError
from pipeline.files import format_of, read_header
from pipeline.masks.mask import Mask
from pipeline.masks.ranking import Ranking

READERS: dict[str, Callable[[Path], Mask | Delta | Ranking]] = {
    "fishmask-mask": Mask.load,
    "fishmask-delta": Delta.load,
    "fishmask-ranking": Ranking.load,
}
_FLOAT = 4  # bytes of a parameter where nothing says its dtype
_KINDS = {"tensors": "coordinates", "coordinates": "coordinates", "buffers": "buffers", "base": "base"}


def load(path: Path) -> Mask | Delta | Ranking:
    """Read a mask, delta or ranking, whichever the file is.

    Returns:
        The artifact, every checksum verified.

    Raises:
        ArtifactError: if the file is corrupt, or of none of these formats.
    """
    found = format_of(path)
    if found not in READERS:
        raise ArtifactError(f"{path}: is a {found} file; expected one of {', '.join(READERS)}")
    return READERS[found](path)


def describe(path: Path, base: str | None = None) -> dict[str, Any]:
    """Describe an artifact file, or the folder of a chain.

    Args:
        path: a mask, delta or ranking; or a chain's folder, for which see ``chains.describe``.
        base: the base model of a delta, as in ``application.apply``: to measure the change against.

    Returns:
        Identity, provenance (``info``), ``sizes`` of the file by kind of content, and ``layers``: one row a tensor
        with ``name``, ``count`` (chosen), ``size`` (all), ``density``, ``bytes`` (of values; None in a mask), and
        for deltas ``norm``: ‖trained - base‖₂, None where the base's values are not known.

    Raises:
        ParamsError: if a base is given for what is no delta.
    """
    if path.is_dir() and base is None:
        return chains.describe(path)
    artifact = load(path)
    mask = artifact if isinstance(artifact, Mask) else artifact.mask
    kind, size = format_of(path), path.stat().st_size
    if base is not None and not isinstance(artifact, Delta):
        raise ParamsError(f"--base: {path} is a {kind} file; a base is compared with deltas only")
    facts: dict[str, Any] = {"file": str(path), "format": kind, "digest": artifact.digest}
    widths = dict.fromkeys(mask.index, 0 if artifact is mask else _FLOAT)
    dense, norms = _FLOAT * mask.index.total, {}
    if isinstance(artifact, Delta):
        facts |= {
            "mask": mask.digest,
            "keeps_base": artifact.known.values is not None,
            "buffers": {name: list(buffer.shape) for name, buffer in artifact.buffers.items()},
        }
        forms = artifact.layout.parameters
        widths = {name: forms[name][0].itemsize for name in mask.index}
        dense = sum(dtype.itemsize * prod(shape) for dtype, shape in forms.values())
        dense += sum(buffer.numel() * buffer.element_size() for buffer in artifact.buffers.values())
        norms = _norms(artifact, base)
    sizes = _sizes(path, kind, size)
    facts |= {"coordinates": mask.nnz, "parameters": mask.index.total, "density": mask.density}
    facts |= {"bytes": size, "sizes": sizes, "dense_bytes": dense, "ratio": dense / size, "info": artifact.info}
    facts |= {"provenance": _provenance(artifact)}
    rows: list[dict[str, Any]] = []
    for name in mask.index:
        count, numel = mask.count(name), mask.index.numel(name)
        row = {"name": name, "count": count, "size": numel, "density": count / max(numel, 1)}
        row |= {"bytes": count * widths[name] if widths[name] else None}
        row |= {"norm": norms.get(name)} if isinstance(artifact, Delta) else {}
        row |= artifact.summary[name] if isinstance(artifact, Ranking) else {}
        rows.append(row)
    return facts | {"layers": rows}


def show(facts: dict[str, Any], depth: int | None, as_json: bool) -> None:
    """Print a description.

    Args:
        facts: as ``describe`` gives them.
        depth: parts of a name to group tensors by; None: as many as leave few rows, and no groups in JSON.
        as_json: print JSON: the facts, and ``groups`` where a depth is given.
    """
    if "steps" in facts:
        chains.show(facts, as_json)
        return
    layers = facts["layers"]
    if as_json:
        groups = {} if depth is None else {"groups": _chosen(chart.grouped(layers, depth))}
        print(json.dumps({**facts, "layers": _chosen(layers)} | groups))
        return
    for key, value in _headline(facts).items():
        print(f"{key:<11} {value}")
    rows = chart.grouped(layers, depth or chart.readable_depth(layers))
    print("\n".join(["", *chart.lines(_chosen(rows), chart.terminal_width())]))


def _chosen(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["count"]]


def _headline(facts: Mapping[str, Any]) -> dict[str, str]:
    """What an artifact is and where it comes from, as text by label."""
    lines = {"file": facts["file"]} | {key: facts[key] for key in ("format", "digest", "mask") if key in facts}
    origin = dict(facts["provenance"])
    score = [origin.pop(key) for key in ("kind", "power") if key in origin]
    if "examples" in origin:
        score.append(f"{origin.pop('examples'):,} examples")
    cell = [str(origin.pop(key)) for key in ("task", "method", "setting") if key in origin]
    origin.pop("density", None)  # what was asked for; the exact one stands below
    lines |= {"parents": ", ".join(d[:12] for d in origin.pop("parents"))} if "parents" in origin else {}
    lines |= {key: str(value) for key, value in origin.items()}
    lines |= {"score": ", ".join(score)} if score else {}
    lines |= {"cell": " ".join(cell)} if cell else {}
    lines["chosen"] = f"{facts['coordinates']:,} of {facts['parameters']:,} ({facts['density']:.4%})"
    sizes = ", ".join(f"{kind} {size:,}" for kind, size in facts["sizes"].items() if size)
    lines["bytes"] = f"{facts['bytes']:,}: {sizes}"
    lines["dense"] = f"{facts['dense_bytes']:,} bytes, {facts['ratio']:,.1f} times as many"
    if facts.get("buffers"):
        lines["buffers"] = f"{len(facts['buffers'])}, whole"
    return lines


def _provenance(artifact: Mask | Delta | Ranking) -> dict[str, Any]:
    """Where an artifact comes from, by one name for each thing whatever the kind of artifact."""
    info = artifact.info
    scored = info if not isinstance(artifact, Delta) else artifact.mask.info
    found = {
        "base": artifact.base if isinstance(artifact, Delta) else info.get("base"),
        "data": info.get("data", scored.get("data")),
        "model": info.get("model", scored.get("model")),
        "seed": info.get("seed", scored.get("seed")),
        "code": info.get("code", info.get("fishmask")),
        "parent": info.get("parent"),
        "parents": [row["digest"] if isinstance(row, dict) else row for row in info.get("parents", ())] or None,
    }
    found |= {key: scored.get(key) for key in ("kind", "power", "examples", "density")}
    found |= {key: info.get(key, scored.get(key)) for key in ("task", "method", "setting")}
    return {key: value for key, value in found.items() if value is not None}


def _sizes(path: Path, kind: str, size: int) -> dict[str, int]:
    """Bytes of the file by what they hold."""
    _, sections = read_header(path, format=kind, version=sys.maxsize)  # the file was read in whole before
    sizes = dict.fromkeys(("coordinates", "values", "buffers", "base", "header"), 0)
    for name, held in sections.items():
        sizes[_KINDS.get(name.partition(".")[0], "values")] += held
    return sizes | {"header": size - sum(sections.values())}


def _norms(delta: Delta, base: str | None) -> dict[str, float]:
    """‖trained - base‖₂ of each tensor, where both are known."""
    if base is None:
        return delta.norms()
    before, _ = application.base_values(delta, base, application.located(base))
    delta.fill_(before)
    return delta.norms(before)
