"""The figures of the main experiment: scores, sweeps, where coordinates lie, curves."""

from collections.abc import Callable, Sequence

from pipeline.reports.cells import Cell
from pipeline.reports.drawing import INK, Figure, drawing, finish, style
from pipeline.reports.results import Results, method_order
from pipeline.reports.statistics import mean, spread
from pipeline.reports.table import metric_title, percent, scale_of, score_text


def methods_figure(results: Results) -> Figure | None:
    """Score of every method at the main setting, one panel a task; None without a score."""
    tasks = [t for t in results.tasks if any((c := results.main(t, m)) and c.values for m in results.methods)]
    if not tasks:
        return None
    title = "Score of each method, main setting; bars: one standard deviation over seeds, dots: single seeds"
    with drawing(len(tasks), 4.2, 0.7 + 0.36 * len(results.methods)) as (figure, axes):
        for task, ax in zip(tasks, axes, strict=True):
            for row, method in enumerate(results.methods):
                cell = results.main(task, method)
                if cell is None or not cell.values:
                    ax.annotate(
                        "no score", (0.5, row), xycoords=ax.get_yaxis_transform(), ha="center", va="center"
                    )
                    continue
                colour, marker = style(method)
                scale = scale_of(cell.metric)
                values = [value * scale for value in cell.values]
                ax.plot(values, [row + 0.22] * len(values), ".", color=colour, markersize=4, alpha=0.7)
                centre, bar = (cell.mean or 0.0) * scale, (cell.spread or 0.0) * scale
                ax.errorbar(
                    centre, row, xerr=bar, color=colour, marker=marker, capsize=3, markersize=6, linewidth=1.4
                )
                ax.set_xlabel(metric_title(cell.metric))
            ax.set_yticks(range(len(results.methods)), results.methods)
            ax.set_ylim(len(results.methods) - 0.5, -0.5)
            ax.grid(visible=False, axis="y")
            ax.set_title(task)
        said = [
            f"{task}: "
            + ", ".join(
                f"{m} {score_text(c)}" for m in results.methods if (c := results.main(task, m)) and c.values
            )
            for task in tasks
        ]
        return finish(figure, "methods", title, "; ".join(said) + ".")


def sweep_figure(results: Results, axis: str) -> Figure | None:
    """Score against density or against scored examples, with dense as a band; None where nothing was swept.

    Args:
        results: what was measured.
        axis: ``density`` or ``examples``.

    Returns:
        One panel per task that has such a sweep.
    """
    lines = {
        task: {method: cells for method in results.methods if (cells := results.sweep(task, method, axis))}
        for task in results.tasks
    }
    lines = {task: methods for task, methods in lines.items() if methods}
    if not lines:
        return None
    name = "density" if axis == "density" else "scored examples"
    said = []
    with drawing(len(lines), 4.6, 3.2) as (figure, axes):
        for (task, methods), ax in zip(lines.items(), axes, strict=True):
            dense = results.main(task, "dense")
            if dense is not None and dense.mean is not None:
                scale, deviation = scale_of(dense.metric), dense.spread or 0.0
                colour = style("dense")[0]
                ax.axhspan(
                    (dense.mean - deviation) * scale, (dense.mean + deviation) * scale, color=colour, alpha=0.15
                )
                ax.axhline(
                    dense.mean * scale, color=colour, linewidth=1.2, linestyle="--", label="dense (mean ± SD)"
                )
            ticks: dict[float, str] = {}
            for method, cells in methods.items():
                kept = [cell for cell in cells if cell.mean is not None]
                colour, marker = style(method)
                scale = scale_of(cells[0].metric)
                x = [getattr(cell, axis) for cell in kept]
                y, bars = ([(getattr(c, part) or 0.0) * scale for c in kept] for part in ("mean", "spread"))
                ax.errorbar(x, y, yerr=bars, color=colour, marker=marker, capsize=3, linewidth=1.4, label=method)
                ticks |= {value: percent(value) if axis == "density" else f"{value:,}" for value in x}
                ax.set_ylabel(metric_title(cells[0].metric))
                said.append(
                    f"{task}, {method}: "
                    + ", ".join(f"{score_text(c)} at {ticks[getattr(c, axis)]}" for c in kept)
                )
            ax.set_xscale("log")
            ax.set_xticks(sorted(ticks), [ticks[value] for value in sorted(ticks)])
            ax.minorticks_off()
            ax.set_xlabel(f"{name}, logarithmic")
            ax.set_title(task)
            ax.legend(loc="best", fontsize=9)
        title = f"Score against {name}; bars and band: one standard deviation over seeds"
        return finish(figure, f"sweep-{axis}", title, "; ".join(said) + ".")


def layout_figure(results: Results, task: str) -> Figure | None:
    """Where each method's coordinates lie: the share of a mask in each group of layers; None without masks.

    Args:
        results: what was measured.
        task: the task.

    Returns:
        A table of shares, shaded: one row a method at the main setting, one column a group of layers in the
        model's order; the first row is the share of all parameters, which an even mask would follow.
    """
    masks = sorted(
        (
            m
            for m in results.masks.values()
            if m.task == task and m.setting == "main" and m.method != "dense" and m.nnz
        ),
        key=lambda mask: method_order(mask.method),
    )
    if not masks:
        return None
    sizes = masks[0].sizes
    groups = list(sizes)
    rows = [("all parameters", sizes), *((mask.method, mask.chosen) for mask in masks)]
    shares = [[100 * counts.get(g, 0.0) / (sum(counts.values()) or 1.0) for g in groups] for _, counts in rows]
    with drawing(1, 1.6 + 0.52 * len(groups), 1.5 + 0.34 * len(rows)) as (figure, (ax,)):
        # A square root spreads the small shares, where most layers lie.
        ax.imshow([[share**0.5 for share in row] for row in shares], cmap="Blues", vmin=0, vmax=10, aspect="auto")
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                text = (
                    ""
                    if share == 0
                    else "<0.1"
                    if share < 0.05
                    else f"{share:.1f}"
                    if share < 9.95
                    else f"{share:.0f}"
                )
                ax.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if share > 35 else INK)
        ax.set_xticks(range(len(groups)), groups, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
        ax.set_yticks(range(len(rows)), [label for label, _ in rows])
        ax.axhline(0.5, color="white", linewidth=3)
        ax.grid(visible=False)
        ax.tick_params(length=0)
        for side in ax.spines.values():
            side.set_visible(False)
        ax.set_title(f"{task}: % of each mask's coordinates")
        said = "; ".join(
            f"{label}: most in " + ", ".join(f"{group} ({share:.0f} %)" for share, group in top if share)
            for (label, _), row in zip(rows, shares, strict=True)
            if (top := sorted(zip(row, groups, strict=True), reverse=True)[:3])
        )
        return finish(figure, f"layout-{task}", f"Where the coordinates of each mask lie, {task}", said + ".")


def curves_figure(results: Results) -> Figure | None:
    """Validation score by epoch at the main setting, mean over seeds, one panel a task; None without epochs."""
    tasks = [t for t in results.tasks if any((c := results.main(t, m)) and _curve(c) for m in results.methods)]
    if not tasks:
        return None
    from matplotlib.ticker import MaxNLocator

    said = []
    with drawing(len(tasks), 4.6, 3.2) as (figure, axes):
        for task, ax in zip(tasks, axes, strict=True):
            for method in results.methods:
                cell = results.main(task, method)
                points = _curve(cell) if cell else []
                if cell is None or not points:
                    continue
                colour, marker = style(method)
                scale = scale_of(cell.metric)
                epochs = [epoch for epoch, _ in points]
                means = [(mean(values) or 0.0) * scale for _, values in points]
                spreads = [(spread(values) or 0.0) * scale for _, values in points]
                said.append(
                    f"{task}, {method}: {means[0]:.1f} after epoch {epochs[0]}, {means[-1]:.1f} after {epochs[-1]}"
                )
                ax.plot(epochs, means, color=colour, marker=marker, markersize=4, linewidth=1.4, label=method)
                low = [m - s for m, s in zip(means, spreads, strict=True)]
                high = [m + s for m, s in zip(means, spreads, strict=True)]
                ax.fill_between(epochs, low, high, color=colour, alpha=0.12, linewidth=0)
                ax.set_ylabel(metric_title(cell.metric))
            ax.set_xlabel("epoch")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.set_title(task)
        shown = {label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        ordered = sorted(shown, key=method_order)
        figure.legend([shown[label] for label in ordered], ordered, loc="outside right center", fontsize=9)
        title = "Validation score by epoch, main setting; mean and one standard deviation over seeds"
        return finish(figure, "curves", title, "; ".join(said) + ".")


def _curve(cell: Cell) -> list[tuple[int, list[float]]]:
    """Epoch -> the metric of each seed that has it."""
    points: dict[int, list[float]] = {}
    for epochs in cell.curves.values():
        for record in epochs:
            if isinstance(value := record.get(cell.metric), int | float):
                points.setdefault(int(record["epoch"]), []).append(float(value))
    return sorted(points.items())


def all_figures(results: Results) -> list[Figure]:
    """Every figure that these results allow.

    Args:
        results: what was measured.

    Returns:
        The figures, each with another name.
    """
    made: Sequence[Callable[[Results], Figure | None]] = (
        methods_figure,
        lambda r: sweep_figure(r, "density"),
        lambda r: sweep_figure(r, "examples"),
        *(lambda r, task=task: layout_figure(r, task) for task in results.tasks),
        curves_figure,
    )
    return [figure for make in made if (figure := make(results)) is not None]
