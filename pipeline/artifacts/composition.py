"""Composing delta files into one, and showing where they overlap."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pipeline.artifacts.application import Done, built, check_out, located
from pipeline.artifacts.checkpoints import Checkpoint
from pipeline.artifacts.streaming import Streamed
from pipeline.deltas import algebra
from pipeline.deltas.delta import Delta
from pipeline.deltas.overlap import overlap
from pipeline.errors import ParamsError
from pipeline.runtime.terminal import print_table

_SHOWN = 12  # tensors of the report's table, those that share most


OPTIONS = {"add": (), "ties": ("density",), "dare": ("drop", "seed")}  # method -> its own


def compose(
    files: Sequence[Path],
    base: str,
    out: Path,
    method: str,
    *,
    weights: Sequence[float] | None = None,
    density: float | None = None,
    drop: float | None = None,
    seed: int | None = None,
    head: int | None = None,
    buffers: str = "equal",
    report: bool = False,
    thin: bool = False,
    force: bool = False,
) -> Done:
    """Compose deltas of one base and write the result, a delta of the same base.

    Args:
        files: the deltas.
        base: their base, as ``application.apply`` takes it.
        out: the new delta's file.
        method: of ``OPTIONS``; see ``pipeline.deltas.algebra``.
        weights: one for each delta, or one for all.
        density: of ``ties``.
        drop: of ``dare``.
        seed: of ``dare``.
        head: the delta, from 0, whose tensors covered whole are taken as they are.
        buffers: ``equal``, ``base``, or the delta, from 0, whose are taken.
        report: also report the overlap of the deltas.
        thin: code the values against the base's: a smaller file, which cannot be read without the base.
        force: replace what stands there.

    Returns:
        What was written; the report under ``overlap``.

    Raises:
        ParamsError: if an option does not belong to the method, or is out of range.
        MismatchError: if the deltas are not of this base.
    """  # noqa: DOC502 - raised by what it calls
    if method not in OPTIONS:
        raise ParamsError(f"--method {method}: expected one of {', '.join(OPTIONS)}")
    given = {"density": density, "drop": drop, "seed": seed}
    own = {name: value for name, value in given.items() if value is not None}
    foreign = sorted(own.keys() - set(OPTIONS[method]))
    if foreign:
        raise ParamsError(f"--{foreign[0]}: is no option of --method {method}; leave it out")
    path = located(base)
    check_out(out, [*files, path], force=force, folder=False)
    deltas = [Delta.load(file) for file in files]
    if weights and len(weights) == 1:
        weights = list(weights) * len(deltas)
    lead = deltas[head] if head is not None and 0 <= head < len(deltas) else deltas[0]
    model = _base(base, path, lead)
    how: dict[str, Any] = {"weights": weights or None, "head": head, "buffers": _buffers(buffers)}
    made: Delta = getattr(algebra, method)(deltas, model, **how, **own)
    size = made.save(out, base=model if thin else None)
    line = (
        f"{out}: {method} of {len(deltas)} deltas, {made.mask.nnz:,} of {made.mask.index.total:,} values, "
        f"{size:,} bytes (delta {made.digest[:12]})"
    )
    facts = {"out": str(out), "delta": made.digest, "values": made.mask.nnz, "bytes": size}
    facts |= {"compose": made.info["compose"], "parents": [delta.digest for delta in deltas]}
    return Done(line, facts | ({"overlap": overlap(deltas, model)} if report else {}))


def show_overlap(report: Mapping[str, Any]) -> None:
    """Print a report of ``overlap`` as tables: the pairs, then the tensors that share most."""
    for title, found in (
        ("overlap of deltas", report["pairs"]),
        ("tensors that share most", sorted(report["tensors"], key=lambda row: -row["shared"])[:_SHOWN]),
    ):
        if not found:
            continue
        named = "name" in found[0]
        columns = [*["tensor"] * named, "deltas", "coordinates", "shared", "Jaccard", "conflicts"]
        rows = []
        for row in found:
            share = "" if row["conflict_share"] is None else f" ({row['conflict_share']:.1%})"
            conflicts = "-" if row["conflicts"] is None else f"{row['conflicts']:,}{share}"
            counts = f"{row['count_a']:,} / {row['count_b']:,}"
            cells = [row["name"]] if named else []
            cells += [f"{row['a']}, {row['b']}", counts, f"{row['shared']:,}", f"{row['jaccard']:.3f}", conflicts]
            rows.append(cells)
        print_table(columns, rows, words=1 + named, title=title)


def _base(source: str, path: Path | None, lead: Delta) -> nn.Module | Mapping[str, Tensor]:
    """The base with all of a delta's tensors: read from its files, or built where they lack a head."""
    if path is not None:
        view = Streamed(Checkpoint.open(path), lead)
        if not view.lacking or view.checkpoint.alone:
            return view
    return built(source, lead)


def _buffers(text: str) -> int | str:
    if text in ("equal", "base"):
        return text
    try:
        return int(text)
    except ValueError:
        raise ParamsError(f"--buffers {text}: expected equal, base or the number of a delta, from 0") from None
