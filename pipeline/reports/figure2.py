"""Figure 2 as the paper crosses it: a line for each density against the number of scored examples."""

from pipeline.reports.cells import Cell
from pipeline.reports.drawing import Figure, drawing, finish
from pipeline.reports.results import Results
from pipeline.reports.table import metric_title, percent, scale_of, score_text

_LINES = 5  # viridis at five places is told apart in print and by colour-blind readers


def crossed(results: Results, task: str, method: str) -> dict[float, list[Cell]]:
    """The cells of a method by density, where two densities or more have two numbers of examples or more.

    Args:
        results: what was measured.
        task: the task.
        method: the method.

    Returns:
        density -> cells with a score, by examples; empty where nothing is crossed.
    """
    lines: dict[float, dict[int, Cell]] = {}
    for (own, name, _), cell in sorted(results.cells.items()):
        if (own, name) == (task, method) and cell.density and cell.examples and cell.values:
            lines.setdefault(float(f"{cell.density:.2g}"), {})[cell.examples] = cell
    wide = {density: [line[count] for count in sorted(line)] for density, line in lines.items() if len(line) > 1}
    return dict(sorted(wide.items())) if len(wide) > 1 else {}


def cross_figure(results: Results) -> Figure | None:
    """Score of fish against examples, a line for each density, one panel a task; None where nothing is crossed."""
    panels = {task: lines for task in results.tasks if (lines := crossed(results, task, "fish"))}
    if not panels:
        return None
    import matplotlib

    said = []
    with drawing(len(panels), 4.6, 3.2) as (figure, axes):
        for (task, lines), ax in zip(panels.items(), axes, strict=True):
            colours = matplotlib.colormaps["viridis"]
            for number, (density, cells) in enumerate(lines.items()):
                scale = scale_of(cells[0].metric)
                colour = colours(0.9 * number / max(_LINES - 1, len(lines) - 1))
                ax.errorbar(
                    [cell.examples or 0 for cell in cells], [(cell.mean or 0.0) * scale for cell in cells],
                    yerr=[(cell.spread or 0.0) * scale for cell in cells], color=colour,
                    marker="osD^v"[number % 5], capsize=3, linewidth=1.4, label=percent(density),
                )  # fmt: skip
                at = ", ".join(f"{score_text(cell)} at {cell.examples:,}" for cell in cells)
                said.append(f"{task}, density {percent(density)}: {at}")
            ticks = sorted({cell.examples or 0 for cells in lines.values() for cell in cells})
            ax.set_xscale("log")
            ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            ax.minorticks_off()
            ax.set_xlabel("scored examples, logarithmic")
            ax.set_ylabel(metric_title(next(iter(lines.values()))[0].metric))
            ax.set_title(task)
            ax.legend(title="density", loc="best", fontsize=9)
        title = "Figure 2: score of fish by density and scored examples; bars: one standard deviation over seeds"
        return finish(figure, "figure2", title, "; ".join(said) + ".")
