"""The picture and the table of ``benchmarks.slow_link``: accuracy against seconds, and against bytes."""

import statistics
from typing import Any

from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.rounds import spread, table
from pipeline.reports.figures import drawing, finish

NAMES = {
    "fish": ("FISH local SGD, 0.5 %", "#0072B2", "D"),
    "powersgd": ("DDP + PowerSGD rank 1", "#E69F00", "s"),
    "local": ("dense local SGD", "#CC79A7", "^"),
    "ddp": ("DDP", "#555555", "o"),
}
"""Contestant -> its name, colour and marker."""
TICKS = {
    "seconds": [10, 20, 30, 60, 120, 300, 600, 1200, 2400],
    "bytes": [3e5, 1e6, 3e6, 1e7, 3e7, 1e8, 3e8, 1e9, 3e9, 1e10],
}


def draw(document: dict[str, Any]) -> str:
    """Draw one measurement: thin lines are seeds, thick ones their mean; a ring where a seed passes the target.

    Returns:
        The svg.
    """
    target, link = document["target"], document["link"]
    with drawing(2, 5.2, 4.2) as (figure, panels):
        for panel, key, unit in zip(panels, ("seconds", "bytes"), ("time", "bytes over the link"), strict=True):
            for way, (name, colour, marker) in NAMES.items():
                runs = [run["records"] for run in document["runs"] if run["way"] == way]
                if not runs:
                    continue
                for records in runs:
                    panel.plot(
                        [r[key] for r in records], [100 * r["accuracy"] for r in records], color=colour, alpha=0.3,
                        linewidth=0.8,
                    )  # fmt: skip
                xs, ys = ([statistics.mean(at) for at in zip(*values, strict=True)] for values in (
                    [[r[key] for r in records] for records in runs],
                    [[100 * r["accuracy"] for r in records] for records in runs],
                ))  # fmt: skip
                passed = [p[key] for records in runs if (p := passing(records, target)) is not None]
                at = statistics.median(passed) if len(passed) == len(runs) else None
                label = f"{name}: {'not reached' if at is None else text(at, key)}"
                panel.plot(xs, ys, color=colour, marker=marker, markersize=4, linewidth=2, label=label)
                if at is not None:
                    panel.plot([at], [100 * target], "o", markersize=12, markerfacecolor="none", color=colour)
            panel.axhline(100 * target, color="#333333", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(FixedLocator(TICKS[key]))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _, key=key: text(x, key)))
            panel.xaxis.set_minor_locator(NullLocator())
            panel.set_xlabel(unit)
            panel.legend(
                loc="lower left" if key == "bytes" else "lower right", title=f"to {target:.0%}", fontsize=9,
                bbox_to_anchor=(0.12, 0.0) if key == "bytes" else None,
            )  # fmt: skip
        panels[0].set_ylabel(f"accuracy on {document['rows']['validation']} words, %")
        panels[0].set_title(f"Time over a {link['mbit']:g} Mbit/s link, {link['delay_ms']:g} ms each way")
        panels[1].set_title("Bytes over the same link")
        for panel in panels:
            lowest = min(100 * r["accuracy"] for run in document["runs"] for r in run["records"])
            panel.set_ylim(bottom=lowest - 16)  # room for the legend
        said = [f"{NAMES[way][0]} {words(document, way)}" for way in NAMES if words(document, way)]
        return finish(
            figure, "slow-link", "Accuracy against seconds and bytes, two workers over a slow link",
            f"Time and bytes to {target:.0%}: " + "; ".join(said) + ".",
        ).svg  # fmt: skip


def passing(records: list[dict[str, float]], target: float) -> dict[str, float] | None:
    """Find the first evaluation at the target or above; None where there is none."""
    return next((record for record in records if record["accuracy"] >= target), None)


def rows_of(document: dict[str, Any]) -> list[str]:
    """Make the table: one row a contestant."""
    target, reference = document["target"], seconds_to(document, "fish")
    rows = []
    for way, (name, _, _) in NAMES.items():
        runs = [run["records"] for run in document["runs"] if run["way"] == way]
        if not runs:
            continue
        ends = [records[-1] for records in runs]
        passed = [p for records in runs if (p := passing(records, target)) is not None]
        whole = len(passed) == len(runs)
        seconds = [p["seconds"] for p in passed]
        rows.append([
            name,
            spread(seconds) if whole else f"reached by {len(passed)} of {len(runs)}",
            f"{statistics.median(seconds) / reference:.1f}x" if whole and reference else "-",
            spread([p["bytes"] / 1e6 for p in passed], 2) if whole else "-",
            spread([end["seconds"] for end in ends]),
            spread([end["bytes"] / 1e6 for end in ends], 2),
            spread([100 * end["accuracy"] for end in ends]),
        ])  # fmt: skip
    to = f"to {target:.0%}"
    return table(
        [
            "",
            f"seconds {to}",
            "of FISH's",
            f"MB {to}",
            "seconds, whole run",
            "MB, whole run",
            "accuracy at the end, %",
        ],
        rows,
    )


def seconds_to(document: dict[str, Any], way: str) -> float | None:
    """Find the median time of a contestant to the target; None where a seed does not reach it."""
    runs = [run["records"] for run in document["runs"] if run["way"] == way]
    passed = [p["seconds"] for records in runs if (p := passing(records, document["target"])) is not None]
    return statistics.median(passed) if runs and len(passed) == len(runs) else None


def words(document: dict[str, Any], way: str) -> str:
    """Say when a contestant passes the target, for those who cannot see the picture."""
    seconds = seconds_to(document, way)
    if seconds is None:
        return ""
    runs = [run["records"] for run in document["runs"] if run["way"] == way]
    nbytes = statistics.median(p["bytes"] for r in runs if (p := passing(r, document["target"])) is not None)
    return f"{text(seconds, 'seconds')} and {text(nbytes, 'bytes')}"


def text(value: float, key: str) -> str:
    """Write a number with its unit."""
    if key == "seconds":
        return f"{value:.0f} s" if value < 60 else f"{value / 60:.1f} min".replace(".0 min", " min")
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.2g} {unit}" if value < 10 * size else f"{value / size:.0f} {unit}"
    return f"{value:.0f} B"
