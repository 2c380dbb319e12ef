"""The macro average over tasks, as GLUE is summed up: seed by seed, so that differences are paired."""

from pipeline.reports.results import Difference, Results
from pipeline.reports.statistics import mean, spread
from pipeline.reports.table import MISSING, Entry, Table, p_text, scale_of, signed

_FEWEST = 3  # tasks; an average of fewer says less than they do


def averages(results: Results, method: str) -> dict[int, float]:
    """Average a method's scores over all tasks, for each seed that has all of them.

    Args:
        results: what was measured.
        method: its name.

    Returns:
        seed -> average in points; empty where a task lacks the method or counts in another unit.
    """
    cells = [results.main(task, method) for task in results.tasks]
    if len(cells) < _FEWEST or any(cell is None or scale_of(cell.metric) != 100 for cell in cells):
        return {}
    scores = [cell.scores for cell in cells if cell is not None]
    shared = [seed for seed in scores[0] if all(own.get(seed) is not None for own in scores)]
    return {seed: 100 * sum(own[seed] or 0.0 for own in scores) / len(scores) for seed in shared}


def average_table(results: Results) -> Table | None:
    """Each method's macro average, and the paired difference of fish to it; None for fewer than three tasks."""
    fish = averages(results, "fish")
    rows, records, left_out = [], [], []
    for method in results.methods:
        own = averages(results, method)
        if not own:
            left_out.append(method)
            continue
        values, deviation = list(own.values()), spread(list(own.values()))
        text = f"{mean(values):.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")
        difference = Difference("average", "fish", method, tuple(fish[s] - own[s] for s in own if s in fish))
        told = method != "fish" and difference.values
        bounds = difference.interval if told else None
        rows.append((
            Entry(method), Entry(text), Entry(str(len(values))),
            Entry(signed(difference.mean or 0.0) if told else MISSING),
            Entry(f"[{signed(bounds[0])}, {signed(bounds[1])}]" if bounds else MISSING),
            Entry(p_text(difference.p) if told and difference.p is not None else MISSING),
        ))  # fmt: skip
        records.append(
            {"method": method, "average": mean(values), "sd": deviation, "seeds": len(values)}
            | {"fish_minus": difference.mean if told else None}
            | {"low": bounds[0] if bounds else None, "high": bounds[1] if bounds else None}
        )
    notes = (
        f"Mean over the tasks {', '.join(results.tasks)}, seed by seed, then mean ± sample standard deviation "
        "over seeds; differences are paired by seed, the interval is the 95 % bootstrap.",
        *([f"Left out, since no seed of theirs has every task: {', '.join(left_out)}."] if left_out else []),
    )
    columns = ("method", "average", "seeds", "fish − method", "95 % interval", "p")
    return (
        Table("average", "Macro average over the tasks", columns, tuple(rows), tuple(records), notes, words=1)
        if rows
        else None
    )
