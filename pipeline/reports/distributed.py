"""Tables 2 and 3 and their figures: what workers reach and send that exchange only what the mask covers."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.reports.drawing import Figure, drawing, finish, style
from pipeline.reports.notes import data_text
from pipeline.reports.results import Results, method_order
from pipeline.reports.shares import ShareCell
from pipeline.reports.table import MISSING, Entry, Table, metric_title, percent, scale_of, score_text, size

NUMBERS = {"text": "2", "image": "3"}
"""Kind of the task -> the paper's table."""

_SHARE = 0.95  # of the best mean score: the score that "bytes to" asks for
_DASHES = ("-", "--", ":", "-.")


def share_table(results: Results, kind: str) -> Table | None:
    """Score and bytes of every distributed cell on tasks of a kind; None without one.

    Args:
        results: what was measured.
        kind: ``text`` (Table 2) or ``image`` (Table 3).

    Returns:
        One row per cell, ordered by task, method, density, mask, merge and local steps.
    """
    cells = _ordered(results, kind)
    if not cells:
        return None
    goals = {task: _goal([cell for cell in cells if cell.task == task]) for task in {cell.task for cell in cells}}
    rows = tuple(_row(cell, goals[cell.task]) for cell in cells)
    records = tuple(_record(cell, goals[cell.task]) for cell in cells)
    columns = (
        "task", "method", "mask", "merge", "local steps", "density", "score", "seeds", "sent", "values",
        "sent until goal", "drift", "lr",
    )  # fmt: skip
    number = NUMBERS[kind]
    title = f"Distributed training (Table {number}): workers exchange only what the mask covers"
    return Table(f"table{number}", title, columns, rows, records, tuple(_notes(cells, goals)), words=4)


def bytes_figure(results: Results) -> Figure | None:
    """Score against bytes sent so far, one panel a task; None where no workers sent anything."""
    tasks = [task for task in results.share_tasks if any(c.total and c.curve() for c in _of(results, task))]
    if not tasks:
        return None
    said = []
    with drawing(len(tasks), 5.4, 3.8) as (figure, axes):
        for task, ax in zip(tasks, axes, strict=True):
            cells = [cell for cell in _of(results, task) if cell.total and cell.curve()]
            for cell in cells:
                points = [point for point in cell.curve() if point.sent > 0]
                scale = scale_of(cell.metric)
                colour, marker = style(cell.method)
                alike = [other for other in cells if other.method == cell.method]
                dashes = _DASHES[alike.index(cell) % len(_DASHES)]
                x, y = [point.sent for point in points], [point.score * scale for point in points]
                ax.plot(x, y, dashes, color=colour, marker=marker, markersize=4, linewidth=1.2, label=_label(cell))
                said.append(f"{task}, {_label(cell)}: {y[-1]:.1f} after {size(x[-1])}")
                ax.set_ylabel(metric_title(cell.metric))
            ax.set_xscale("log")
            ticks = _ticks([point.sent for cell in cells for point in cell.curve() if point.sent > 0])
            ax.set_xticks(ticks, [size(tick) for tick in ticks])
            ax.minorticks_off()
            ax.set_xlabel("sent by all workers so far, logarithmic")
            ax.set_title(task)
            ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
        title = f"Score against bytes sent; a point a scored merge, means over {_number(results.shares.values())}"
        return finish(figure, "bytes", title, "; ".join(said) + ".")


def steps_figure(results: Results) -> Figure | None:
    """Score against local steps between merges, one panel a task; None where no method has two settings."""
    lines = {task: found for task in results.share_tasks if (found := _lines(_of(results, task)))}
    if not lines:
        return None
    said = []
    with drawing(len(lines), 4.8, 3.4) as (figure, axes):
        for (task, found), ax in zip(lines.items(), axes, strict=True):
            for position, cells in enumerate(found):
                scale = scale_of(cells[0].metric)
                colour, marker = style(cells[0].method)
                x, y = [cell.every for cell in cells], [(cell.mean or 0.0) * scale for cell in cells]
                bars = [(cell.spread or 0.0) * scale for cell in cells]
                label = _label(cells[0], steps=False)
                dashes = _DASHES[sum(c[0].method == cells[0].method for c in found[:position]) % len(_DASHES)]
                ax.errorbar(
                    x, y, yerr=bars, color=colour, marker=marker, linestyle=dashes, capsize=3, linewidth=1.4,
                    label=label,
                )  # fmt: skip
                said.append(f"{task}, {label}: " + ", ".join(f"{score_text(c)} at {c.every}" for c in cells))
                ax.set_ylabel(metric_title(cells[0].metric))
            steps = sorted({cell.every for cells in found for cell in cells})
            ax.set_xscale("log")
            ax.set_xticks(steps, [str(step) for step in steps])
            ax.minorticks_off()
            ax.set_xlabel("local steps between merges, logarithmic")
            ax.set_title(task)
            ax.legend(loc="best", fontsize=8)
        number = _number([cell for found in lines.values() for line in found for cell in line])
        title = f"Score against local steps; bars: one standard deviation over {number}"
        return finish(figure, "local-steps", title, "; ".join(said) + ".")


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers between the least and the largest, the roundest that give two at least."""
    low, high = min(values), max(values)
    found: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 4, 6, 8)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [d * 10.0**decade for decade in decades for d in digits if low <= d * 10.0**decade <= high]
        if len(found) >= 2:
            break
    return found or [low]


def _ordered(results: Results, kind: str) -> list[ShareCell]:
    def key(cell: ShareCell) -> tuple[Any, ...]:
        order = (cell.workers > 1, cell.density, cell.own_masks, cell.average, cell.every)
        return (cell.task, method_order(cell.method), *order)

    return sorted((cell for cell in results.shares.values() if cell.kind == kind), key=key)


def _of(results: Results, task: str) -> list[ShareCell]:
    return [cell for kind in NUMBERS for cell in _ordered(results, kind) if cell.task == task]


def _goal(cells: Sequence[ShareCell]) -> float | None:
    """A score to ask for: 95 % of the best mean."""
    return max((cell.mean * _SHARE for cell in cells if cell.mean is not None), default=None)


def _lines(cells: Sequence[ShareCell]) -> list[list[ShareCell]]:
    """Cells that differ in their local steps only, ascending; lines of two at least."""
    lines: dict[tuple[Any, ...], list[ShareCell]] = {}
    for cell in cells:
        if cell.workers > 1 and cell.every and cell.mean is not None:
            kind = (cell.method, cell.density, cell.own_masks, cell.average, cell.warmup, cell.shard)
            lines.setdefault(kind, []).append(cell)
    return [sorted(line, key=lambda cell: cell.every) for line in lines.values() if len(line) > 1]


def _label(cell: ShareCell, *, steps: bool = True) -> str:
    """``fish 2 %, own masks, sum, 4 steps``."""
    parts = [cell.method + (f" {percent(cell.density)}" if cell.method != "dense" else "")]
    parts += ["own masks"] if cell.mask == "own" else []
    parts += [cell.merge] if cell.merge != "mean" else []
    return ", ".join(parts + ([f"{cell.every} steps"] if steps and cell.every and cell.workers > 1 else []))


def _course(cell: ShareCell) -> str:
    """``2 workers, each with a part of the data; 5 epochs, of which the first trains everything``."""
    workers = "1 worker with all of the data"
    if cell.workers > 1:
        workers = f"{cell.workers} workers, each with {'a part' if cell.shard else 'all'} of the data"
    epochs = f"{cell.epochs} epoch{'s' * (cell.epochs != 1)}"
    if cell.warmup:
        first = "first trains" if cell.warmup == 1 else f"first {cell.warmup} train"
        epochs += f", of which the {first} everything"
    return f"{workers}, {epochs}"


def _row(cell: ShareCell, goal: float | None) -> tuple[Entry, ...]:
    reached = None if goal is None else cell.bytes_to(goal)
    texts = [cell.task, cell.method, cell.mask or MISSING, cell.merge]
    texts += [str(cell.every) if cell.every and cell.workers > 1 else MISSING, percent(cell.density)]
    texts += [score_text(cell), str(len(cell.values)), size(cell.total) if cell.total else "0 B"]
    texts += [size(cell.sent.get("values", 0.0))]
    texts += [MISSING if reached is None else size(reached)]
    texts += [MISSING if cell.drift is None or cell.workers == 1 else f"{cell.drift:.3g}", f"{cell.lr:g}"]
    return tuple(map(Entry, texts))


def _record(cell: ShareCell, goal: float | None) -> dict[str, Any]:
    """One csv row: raw numbers, and the data they were measured on."""
    names = ("task", "method", "setting", "metric", "mean")
    how = ("workers", "every", "average", "own_masks", "shard", "warmup", "density", "lr")
    scores = {f"seed_{seed}": score for seed, score in cell.scores.items()}
    return (
        {name: getattr(cell, name) for name in names}
        | {"sd": cell.spread, "seeds": len(cell.values)}
        | {name: getattr(cell, name) for name in how}
        | {"merges": cell.count, "drift": cell.drift, "sent_bytes": cell.total}
        | {f"{purpose}_bytes": count for purpose, count in cell.sent.items()}
        | {"goal": goal, "bytes_to_goal": None if goal is None else cell.bytes_to(goal)}
        | {"dense_bytes": cell.dense_bytes, "data_digest": cell.data.get("digest")}
        | scores
    )


def _number(cells: Iterable[ShareCell]) -> str:
    """``n = 2 seeds`` or ``n = 2 to 3 seeds``."""
    counts = sorted({len(cell.values) for cell in cells})
    return f"n = {counts[0]} seeds" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]} seeds"


def _notes(cells: Sequence[ShareCell], goals: dict[str, float | None]) -> list[str]:
    notes = [
        f"Mean ± sample standard deviation over {_number(cells)}, after the last merge. Workers are processes; "
        "sent is what all of them handed to collectives for others, buffers, checks and masks included, mean over "
        "seeds; values is the part of it that carries changes of parameters.",
        "Density is what one worker trains. Drift is how far the workers were apart at a merge, in units of the "
        "parameters: the Euclidean distance of a worker's change from their mean, root mean square over workers, "
        "averaged over merges.",
    ]
    told = [f"{scale_of(c.metric) * goal:.1f} on {task}" for task, goal in goals.items() if goal is not None
            for c in [next(cell for cell in cells if cell.task == task)]]  # fmt: skip
    if told:
        notes.append(
            f"The goal is {percent(_SHARE)} of the task's best mean: {', '.join(told)}; – where not every seed "
            "got there at a scored merge."
        )
    for task in goals:
        alike: dict[str, list[str]] = {}
        for cell in (own := [cell for cell in cells if cell.task == task]):
            alike.setdefault(_course(cell), []).append(_label(cell))
        usual = max(alike, key=lambda how: len(alike[how]))
        courses = [usual, *(f"{', '.join(who)}: {how}" for how, who in alike.items() if how != usual)]
        notes.append(f"{task}: {metric_title(own[0].metric)}; {'; '.join(courses)}; {data_text(own[0])}.")
    foreign = [f"{cell.task} {_label(cell)}" for cell in cells if not cell.own_rate and cell.workers > 1]
    if foreign:
        which = "all rows" if len(foreign) == sum(cell.workers > 1 for cell in cells) else "; ".join(foreign)
        notes.append(
            f"lr is the method's rate for one worker at the main setting, not searched for these workers, merges "
            f"and epochs, which may favour a method: {which}."
        )
    for cell in cells:
        lost = [str(seed) for seed, score in cell.scores.items() if score is None or not math.isfinite(score)]
        if lost:
            notes.append(f"{cell.task} {_label(cell)}: diverged and not counted: seed {', '.join(lost)}.")
    return notes
