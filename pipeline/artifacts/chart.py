"""The layers of an artifact as lines of a terminal: grouped by module, with bars, no wider than the terminal."""

import os
import shutil
import sys
from collections.abc import Callable
from math import hypot
from typing import Any

Row = dict[str, Any]
_ROWS = 40  # as many are still read at a glance
_BAR, _LEAST = 24, 6  # characters of the longest bar: at most, and at least
_NAME = 12  # characters of a name that are always shown
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "count": ("chosen", "{:,}".format),
    "size": ("of", "{:,}".format),
    "density": ("density", "{:.3%}".format),
    "bytes": ("bytes", "{:,}".format),
    "norm": ("change", "{:.4g}".format),
}
_BARS = ("count", "norm")  # drawn after the other columns


def grouped(rows: list[Row], depth: int) -> list[Row]:
    """Join the rows of tensors whose names begin with the same parts.

    Args:
        rows: ``name``, ``count`` (chosen), ``size`` (all), ``bytes`` (of values) and ``norm`` (of the change) of
            each tensor; the last two may be None or absent.
        depth: parts of a name to keep, from 1.

    Returns:
        Rows of the same kind with ``density`` and ``tensors``, in the order of their first tensor: sums, and norms
        as of one long vector; None where it is not known of every tensor with a coordinate.
    """
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(".".join(row["name"].split(".")[:depth]), []).append(row)
    joined = []
    for name, group in parts.items():
        count, size = sum(row["count"] for row in group), sum(row["size"] for row in group)
        row = {"name": name, "tensors": len(group), "count": count, "size": size, "density": count / max(size, 1)}
        for key, join in (("bytes", sum), ("norm", lambda norms: hypot(*norms))):
            known = [row.get(key) for row in group if row["count"]]
            row[key] = None if None in known else join(known)
        joined.append(row)
    return joined


def readable_depth(rows: list[Row]) -> int:
    """Choose how many parts of a name to keep: as many as leave few rows, so that a deep model fits a screen.

    Returns:
        The depth, from 1.
    """
    deepest = max((row["name"].count(".") + 1 for row in rows), default=1)
    held = [row["name"].split(".") for row in rows if row["count"]]
    few = (d for d in range(deepest, 1, -1) if len({tuple(name[:d]) for name in held}) <= _ROWS)
    return next(few, 1)


def terminal_width() -> int | None:
    """Measure the terminal.

    Returns:
        Its columns, as COLUMNS says where it is set; None where the output goes to a file or pipe.
    """
    if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit():
        return shutil.get_terminal_size().columns
    return None


def lines(rows: list[Row], width: int | None) -> list[str]:
    """Draw rows as a table with bars: of the chosen coordinates, and of the change where it is known.

    Args:
        rows: as ``grouped`` gives them.
        width: characters of a line: names are cut at their front and bars shortened to fit; None: any.

    Returns:
        The lines, a header first.
    """
    keys = [key for key in _COLUMNS if any(row.get(key) is not None for row in rows)]
    table = [[_COLUMNS[key][0] for key in keys]]
    table += [[_COLUMNS[key][1](row[key]) if row.get(key) is not None else "-" for key in keys] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    bars = [key for key in _BARS if key in keys]
    names = max((len(row["name"]) for row in rows), default=0)
    bar = _BAR
    if width is not None:
        rest = width - sum(widths) - 2 * (len(widths) + len(bars))
        bar = max(_LEAST, min(_BAR, (rest - names) // max(len(bars), 1)))
        names = min(names, max(_NAME, rest - bar * len(bars)))
    largest = {key: max((row[key] or 0 for row in rows), default=0) for key in bars}
    drawn = []
    for number, cells in enumerate(table):
        row: Row = rows[number - 1] if number else {"name": ""}
        name = row["name"] if len(row["name"]) <= names else "…" + row["name"][1 - names :]
        line = [name.ljust(names), *(cell.rjust(w) for cell, w in zip(cells, widths, strict=True))]
        for key in bars:
            share = (row[key] or 0) / (largest[key] or 1) if number else 0
            title = f"by {_COLUMNS[key][0]}"
            line.append((_bar(share, bar) if number else title * (len(title) <= bar)).ljust(bar))
        drawn.append("  ".join(line).rstrip())
    return drawn


def _bar(share: float, width: int) -> str:
    """Draw a share of 0..1; what is not nothing is seen."""
    eighths = max(round(8 * width * share), 1 if share else 0)
    return _EIGHTHS[8] * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
