"""What stands below a table: seeds, spread, data, divergence, and what a comparison cannot say."""

from collections.abc import Sequence

from pipeline.reports.cells import Cell
from pipeline.reports.chains import ChainCell
from pipeline.reports.results import MIN_SEEDS, Difference, Results
from pipeline.reports.shares import ShareCell
from pipeline.reports.statistics import mean
from pipeline.reports.statistics import spread as spread_of
from pipeline.reports.table import metric_title, scale_of


def cell_notes(cells: Sequence[Cell], *, spread: bool = True) -> list[str]:
    """Seeds, spread, data and divergence of these cells."""
    counts = sorted({len(cell.values) for cell in cells}) or [0]
    number = f"n = {counts[0]} seeds" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]} seeds"
    notes = [f"Mean ± sample standard deviation over {number}."] if spread and cells else []
    for task in sorted({cell.task for cell in cells}):
        of_task = [cell for cell in cells if cell.task == task]
        titles = ", ".join(sorted({metric_title(cell.metric) for cell in of_task}))
        notes.append(f"{task}: {titles}; {data_text(of_task[0])}.")
    for cell in cells:
        if cell.mismatched:
            others = list(cell.mismatched.values())
            scale, deviation = scale_of(cell.metric), spread_of(others)
            text = f"{(mean(others) or 0.0) * scale:.1f}"
            text += "" if deviation is None else f" ± {deviation * scale:.1f}"
            notes.append(f"{cell.task} {cell.method} {cell.setting}: {text} on the mismatched validation split.")
        if cell.diverged or len(cell.values) < len(cell.scores):
            lost = [seed for seed, score in cell.scores.items() if score is None]
            name = f"{cell.task} {cell.method} {cell.setting}"
            parts = [f"seed {s} diverged and is {'not ' * (s in lost)}counted" for s in cell.diverged]
            parts += [f"seed {s} has no score and is not counted" for s in lost if s not in cell.diverged]
            notes.append(f"{name}: {'; '.join(parts)}.")
    return notes


def data_text(cell: Cell | ChainCell | ShareCell) -> str:
    """``scored on 1,438 validation rows, trained on 3,000 train rows; <source> <revision>; <remarks>``."""
    rows: dict[str, int] = dict(cell.data.get("rows") or {})
    parts = []
    scored = cell.data.get("reported", "validation")
    if scored in rows:
        parts.append(f"scored on {rows[scored]:,} {scored} rows")
    if scored in rows and "train" in rows and scored != "train":
        parts[0] += f", trained on {rows['train']:,} train rows"
    if source := cell.data.get("source"):
        parts.append(" ".join(str(part) for part in (source, cell.data.get("revision")) if part))
    if remark := remark_text(cell):
        parts.append(remark)
    return "; ".join(parts) or "rows not recorded"


def remark_text(cell: Cell | ChainCell | ShareCell) -> str:
    """What is particular about the data: one remark, or one for each split."""
    remarks = cell.data.get("remarks") or {}
    told = [f"{split}: {remark}" for split, remark in remarks.items() if remark] + [cell.data.get("remark")]
    return "; ".join(str(remark).strip().rstrip(".") for remark in told if remark)


def bold_notes(results: Results) -> list[str]:
    """Say for each task what is bold at the main setting, and why."""
    best = {task: results.best_sparse(task) for task in results.tasks}
    notes = []
    for task, method in best.items():
        if method is None:
            notes.append(f"{task}: no sparse method is told apart from all the others, so none is bold.")
        else:
            notes.append(
                f"{task}: {method} is bold, since its paired difference to each other sparse method excludes 0."
            )
    return notes + (few_seeds(results.at("main")) if any(best.values()) else [])


def few_seeds(cells: Sequence[Cell | Difference]) -> list[str]:
    """What an interval from few seeds cannot say; n differences share their sign by chance in 2^(1-n)."""
    n = min((count for cell in cells if (count := len(cell.values)) >= MIN_SEEDS), default=0)
    if n == MIN_SEEDS:
        return [
            f"With {n} seeds such an interval is the range of the differences: it excludes 0 when all have one "
            f"sign, which chance alone gives in 1 of {2 ** (n - 1)} comparisons: consistent, but not proven."
        ]
    if MIN_SEEDS < n < 10:
        return [
            f"With {n} seeds the bootstrap interval is somewhat too narrow; the t-test is the stricter reading."
        ]
    return []
