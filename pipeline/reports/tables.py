"""The tables of the report: each says how many seeds, mean and spread, and what data it was measured on."""

from collections.abc import Callable, Sequence
from typing import Any

from pipeline.reports.cells import Cell
from pipeline.reports.notes import bold_notes, cell_notes, few_seeds, remark_text
from pipeline.reports.results import MIN_SEEDS, Results
from pipeline.reports.table import (
    MISSING,
    Entry,
    Table,
    metric_title,
    p_text,
    percent,
    scale_of,
    score_text,
    signed,
    size,
)


def main_table(results: Results) -> Table:
    """Table 1: every method on every task at the main setting.

    Args:
        results: what was measured.

    Returns:
        One row per task and method; a missing cell is a row of dashes. Bold marks a sparse method only where its
        paired difference to every other sparse method has an interval above zero.
    """
    rows, records = [], []
    for task in results.tasks:
        best = results.best_sparse(task)
        for method in results.methods:
            cell = results.main(task, method)
            rows.append((
                Entry(task),
                Entry(method),
                Entry(score_text(cell), bold=method == best),
                Entry(_text(cell and len(cell.values))),
                Entry(_text(cell and cell.density, percent)),
                Entry(_text(cell and cell.delta_bytes, size)),
                Entry(_text(cell and cell.dense_bytes, size)),
                Entry(_text(cell and cell.lr, "{:g}".format)),
            ))
            records.append(_record(cell, task, method, "main"))
    columns = ("task", "method", "score", "seeds", "trained", "artifact", "dense file", "lr")
    notes = (*cell_notes(results.at("main")), *bold_notes(results))
    return Table(
        "main", "Main result: score after training only the mask", columns, tuple(rows), tuple(records), notes
    )


def overview_table(results: Results) -> Table | None:
    """The scores of Table 1 as methods x tasks; None for a single task."""
    if len(results.tasks) < 2:
        return None
    best = {task: results.best_sparse(task) for task in results.tasks}
    rows, records = [], []
    for method in results.methods:
        cells = {task: results.main(task, method) for task in results.tasks}
        rows.append((
            Entry(method),
            *(Entry(score_text(cell), bold=best[task] == method) for task, cell in cells.items()),
        ))
        records.append({"method": method} | {f"{task}_mean": cell and cell.mean for task, cell in cells.items()})
    titles = [f"{task}, {metric_title(_metric(results, task))}" for task in results.tasks]
    notes = (*cell_notes(results.at("main")), *bold_notes(results))
    return Table("overview", "Methods by task", ("method", *titles), tuple(rows), tuple(records), notes, words=1)


def difference_table(results: Results) -> Table | None:
    """Paired differences of fish to every other method; None where there is nothing to compare."""
    rows, records, differences = [], [], []
    cells: dict[tuple[str, str], Cell] = {}
    for task in results.tasks:
        for other in results.methods:
            difference = None if other == "fish" else results.difference(task, "fish", other)
            if difference is None:
                continue
            metric = _metric(results, task)
            scale, interval = scale_of(metric), difference.interval
            low, high = interval or (None, None)
            bounds = f"[{signed(interval[0] * scale)}, {signed(interval[1] * scale)}]" if interval else MISSING
            verdict = {1: "fish above", -1: "fish below", 0: "not told apart"}[difference.sign]
            verdict = verdict if len(difference.values) >= MIN_SEEDS else "too few seeds"
            rows.append((
                Entry(task),
                Entry(f"fish − {other}"),
                Entry(signed((difference.mean or 0.0) * scale)),
                Entry(bounds),
                Entry(_text(difference.p, p_text)),
                Entry(str(len(difference.values))),
                Entry(verdict),
            ))
            records.append(
                {"task": task, "metric": metric, "method": "fish", "other": other, "seeds": len(difference.values)}
                | {"mean_difference": difference.mean, "low": low, "high": high, "p_paired_t": difference.p}
            )
            differences.append(difference)
            cells |= {(task, m): cell for m in ("fish", other) if (cell := results.main(task, m))}
    if not rows:
        return None
    columns = ("task", "difference", "mean", "95 % interval", "p", "seeds", "interval and 0")
    notes = (
        "Differences are paired by seed. The interval is the percentile bootstrap of their mean; p is that of the "
        "paired t-test, two-sided.",
        *few_seeds(differences),
        *cell_notes([*cells.values()], spread=False),
    )
    title = "Paired differences of fish to the other methods, main setting"
    return Table("differences", title, columns, tuple(rows), tuple(records), notes)


def sweep_table(results: Results, axis: str) -> Table | None:
    """Figure 2 in numbers: score against density, or against the number of scored examples.

    Args:
        results: what was measured.
        axis: ``density`` or ``examples``.

    Returns:
        One row per cell that differs from the main setting in that quantity only, the main setting included, and
        dense for comparison; None where no such cell was run.
    """
    rows, records, used = [], [], []
    for task in results.tasks:
        swept = [cell for method in results.methods for cell in results.sweep(task, method, axis)]
        dense = results.main(task, "dense")
        for cell in swept + ([dense] if swept and dense else []):
            value = cell.density if axis == "density" else cell.examples
            format_ = percent if axis == "density" else "{:,}".format
            rows.append((
                Entry(task),
                Entry(cell.method),
                Entry(cell.setting),
                Entry(_text(value, format_) if cell is not dense or axis == "density" else MISSING),
                Entry(score_text(cell)),
                Entry(str(len(cell.values))),
                Entry(_text(cell.delta_bytes, size)),
            ))
            records.append(_record(cell, task, cell.method, cell.setting))
            used.append(cell)
    if not rows:
        return None
    name = "density" if axis == "density" else "scored examples"
    columns = ("task", "method", "setting", name, "score", "seeds", "artifact")
    title = f"Score against {name}"
    return Table(f"sweep-{axis}", title, columns, tuple(rows), tuple(records), tuple(cell_notes(used)), words=3)


def mask_table(results: Results) -> Table | None:
    """What each mask costs on disk; None without mask metrics."""
    order = sorted(
        results.masks.values(), key=lambda mask: (mask.task, _order(results, mask.method), mask.setting)
    )
    rows = tuple(
        (
            Entry(mask.task),
            Entry(mask.method),
            Entry(mask.setting),
            Entry(f"{mask.nnz:,.0f}"),
            Entry(percent(mask.density)),
            Entry(size(mask.bytes)),
            Entry(f"{8 * mask.bytes / mask.nnz:.2f}" if mask.nnz else MISSING),
            Entry(str(len(mask.digests))),
        )
        for mask in order
    )
    records = tuple(
        {"task": mask.task, "method": mask.method, "setting": mask.setting, "nnz": mask.nnz}
        | {"density": mask.density, "bytes": mask.bytes, "seeds": len(mask.digests)}
        for mask in order
    )
    columns = ("task", "method", "setting", "coordinates", "density", "file", "bits per coordinate", "seeds")
    notes = ("Means over seeds; the file holds the coordinates, entropy-coded, with header and checksums.",)
    return Table("masks", "Masks on disk", columns, rows, records, notes, words=3) if rows else None


def all_table(results: Results) -> Table | None:
    """Every trained cell; None without one."""
    cells = [
        results.cells[key]
        for key in sorted(results.cells, key=lambda k: (k[0], _order(results, k[1]), k[2] != "main", k))
    ]
    rows = tuple(
        (
            Entry(cell.task),
            Entry(cell.method),
            Entry(cell.setting),
            Entry(score_text(cell)),
            Entry(str(len(cell.values))),
            Entry(_text(cell.nnz, "{:,}".format)),
            Entry(_text(cell.density, percent)),
            Entry(_text(cell.examples, "{:,}".format)),
            Entry(_text(cell.delta_bytes, size)),
            Entry(_text(cell.lr, "{:g}".format)),
        )
        for cell in cells
    )
    records = tuple(_record(cell, cell.task, cell.method, cell.setting) for cell in cells)
    columns = (
        "task", "method", "setting", "score", "seeds", "coordinates", "density", "examples", "artifact", "lr",
    )  # fmt: skip
    return (
        Table("cells", "Every cell", columns, rows, records, tuple(cell_notes(cells)), words=3) if rows else None
    )


def all_tables(results: Results) -> list[Table]:
    """Every table that these results allow, Table 1 first.

    Args:
        results: what was measured.

    Returns:
        The tables, each with another name.
    """
    made: Sequence[Callable[[Results], Table | None]] = (
        main_table,
        overview_table,
        difference_table,
        lambda r: sweep_table(r, "density"),
        lambda r: sweep_table(r, "examples"),
        mask_table,
        all_table,
    )
    return [table for make in made if (table := make(results)) is not None]


def _text(value: Any, form: Callable[[Any], str] = str) -> str:
    return MISSING if value is None else form(value)


def _order(results: Results, method: str) -> tuple[int, str]:
    return (results.methods.index(method) if method in results.methods else len(results.methods), method)


def _metric(results: Results, task: str) -> str:
    return next(cell.metric for cell in results.cells.values() if cell.task == task)


def _record(cell: Cell | None, task: str, method: str, setting: str) -> dict[str, Any]:
    """One csv row: raw numbers, and the data they were measured on."""
    identity = {"task": task, "method": method, "setting": setting}
    if cell is None:
        return identity
    rows = {f"rows_{split}": count for split, count in sorted((cell.data.get("rows") or {}).items())}
    scores = {f"seed_{seed}": score for seed, score in cell.scores.items()}
    return (
        identity
        | {"metric": cell.metric, "mean": cell.mean, "sd": cell.spread, "seeds": len(cell.values)}
        | {"seeds_diverged": len(cell.diverged), "nnz": cell.nnz, "parameters": cell.parameters}
        | {"density": cell.density, "scored_examples": cell.examples, "lr": cell.lr}
        | {"artifact_bytes": cell.delta_bytes, "dense_bytes": cell.dense_bytes}
        | {
            "data_source": cell.data.get("source"),
            "data_remark": remark_text(cell),
            "data_digest": cell.data.get("digest"),
        }
        | rows
        | scores
    )
