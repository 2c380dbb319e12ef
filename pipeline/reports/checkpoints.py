"""Table 4 and its figure: what a checkpoint weighs that holds only what its mask touched; what a leak costs."""

from collections.abc import Sequence
from typing import Any

from pipeline.reports.chains import ChainCell
from pipeline.reports.drawing import Figure, drawing, finish, style
from pipeline.reports.notes import data_text
from pipeline.reports.results import Results, method_order
from pipeline.reports.table import MISSING, Entry, Table, metric_title, percent, scale_of, score_text, size

_LEAK = " everywhere"


def checkpoint_table(results: Results) -> Table | None:
    """Table 4: score and bytes of every chain; None without one.

    Args:
        results: what was measured.

    Returns:
        One row per cell, ordered by task, density, mask and method, and per task a row of dense training where it
        was run at the main setting.
    """
    cells = _ordered(results)
    if not cells:
        return None
    rows: list[tuple[Entry, ...]] = []
    records: list[dict[str, Any]] = []
    for task in dict.fromkeys(cell.task for cell in cells):
        of_task = [cell for cell in cells if cell.task == task]
        rows += [_row(cell) for cell in of_task]
        records += [_record(cell) for cell in of_task]
        dense = results.main(task, "dense")
        if dense is not None and dense.dense_bytes:
            bytes_ = size(dense.dense_bytes)
            texts = [task, "dense", MISSING, "100 %", score_text(dense), str(len(dense.values))]
            rows.append(tuple(map(Entry, [*texts, *[MISSING] * 3, bytes_, "1", *[MISSING] * 3])))
            records.append({"task": task, "method": "dense", "mean": dense.mean, "sd": dense.spread})
    columns = (
        "task", "method", "mask", "density", "score", "seeds", "coordinates", "values", "buffers", "checkpoint",
        "dense / checkpoint", "restored exactly", "weight decay", "lr",
    )  # fmt: skip
    title = "Efficient checkpointing (Table 4): every epoch's checkpoint holds only what its mask touched"
    return Table("checkpoints", title, columns, tuple(rows), tuple(records), tuple(_notes(cells)), words=3)


def decay_figure(results: Results) -> Figure | None:
    """Decay of the frozen weights against the score, epoch by epoch; None where no cell leaks.

    Args:
        results: what was measured.

    Returns:
        One panel a task: each leaking cell, and the cells like it that do not leak.
    """
    pairs = {task: cells for task in results.chain_tasks if (cells := _leaks(results, task))}
    if not pairs:
        return None
    said = []
    with drawing(len(pairs), 5.4, 3.6) as (figure, axes):
        for (task, cells), ax in zip(pairs.items(), axes, strict=True):
            for cell in cells:
                points = cell.decay()
                if not points:
                    continue
                scale, scope = scale_of(cell.metric), "every weight" if cell.leak else "the mask only"
                colour, marker = style("random" if cell.leak else cell.method)
                x, y = [norm for norm, _ in points], [score * scale for _, score in points]
                label = f"{cell.method} {percent(cell.density)}, decay on {scope}"
                ax.plot(x, y, color=colour, marker=marker, linewidth=1.4, markersize=5, label=label)
                for epoch, place in enumerate(zip(x, y, strict=True), 1):
                    ax.annotate(str(epoch), place, xytext=(5, 3), textcoords="offset points", fontsize=8)
                ax.set_ylabel(metric_title(cell.metric))
                told = ", ".join(f"{b:.1f} at {a:.3g}" for a, b in zip(x, y, strict=True))
                said.append(f"{task}, {label}: {told}")
            ax.set_xscale("log")
            ax.set_xlabel("norm of the frozen weights, now / at the start")
            ax.set_title(task)
            ax.legend(loc="best", fontsize=9)
        title = "Frozen-weight decay against score after each epoch (numbers: epochs; means over seeds)"
        return finish(figure, "decay", title, "; ".join(said) + ".")


def _ordered(results: Results) -> list[ChainCell]:
    def key(cell: ChainCell) -> tuple[Any, ...]:
        return (cell.task, cell.leak, cell.weight_decay, cell.density, cell.every or 0, method_order(cell.method))

    return sorted(results.chains.values(), key=key)


def _leaks(results: Results, task: str) -> list[ChainCell]:
    """The leaking cells of a task, each with its likes that do not leak."""
    cells = [cell for cell in _ordered(results) if cell.task == task and cell.every is None]

    def like(cell: ChainCell) -> tuple[str, float, float]:
        return cell.method, round(cell.density, 4), cell.weight_decay

    leaking = {like(cell) for cell in cells if cell.leak}
    return [cell for cell in cells if like(cell) in leaking]


def _row(cell: ChainCell) -> tuple[Entry, ...]:
    total, dense = cell.checkpoint_bytes, cell.dense_bytes
    texts = [cell.task, cell.method, cell.mask, percent(cell.density), score_text(cell), str(len(cell.values))]
    texts += [size(cell.parts[part]) if cell.parts else MISSING for part in ("coordinates", "values", "buffers")]
    texts += [size(total) if total else MISSING, f"{dense / total:.3g}" if dense and total else MISSING]
    texts += [str(cell.checkpoints)]
    return tuple(map(Entry, [*texts, f"{cell.weight_decay:g}{_LEAK * cell.leak}", f"{cell.lr:g}"]))


def _record(cell: ChainCell) -> dict[str, Any]:
    """One csv row: raw numbers, and the data they were measured on."""
    names = ("task", "method", "setting", "metric", "mean")
    scores = {f"seed_{seed}": score for seed, score in cell.scores.items()}
    return (
        {name: getattr(cell, name) for name in names}
        | {"sd": cell.spread, "seeds": len(cell.values), "density": cell.density, "every": cell.every}
        | {f"{part}_bytes": count for part, count in cell.parts.items()}
        | {"checkpoint_bytes": cell.checkpoint_bytes, "dense_bytes": cell.dense_bytes}
        | {"checkpoints": cell.checkpoints, "lr": cell.lr, "weight_decay": cell.weight_decay}
        | {"weight_decay_scope": "all" if cell.leak else "mask", "data_digest": cell.data.get("digest")}
        | scores
    )


def _notes(cells: Sequence[ChainCell]) -> list[str]:
    counts = sorted({len(cell.values) for cell in cells})
    number = f"n = {counts[0]} seeds" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]} seeds"
    notes = [
        f"Mean ± sample standard deviation over {number}, of the last checkpoint.",
        "Every checkpoint was read back from its files, compared with the trained model bit for bit and scored; "
        "a run with one that differed would have failed. Bytes are means over all of them, the sum with headers; "
        "coordinates of a fixed mask are written once. The base, one dense file, is not counted.",
    ]
    if any(cell.leak for cell in cells):
        notes.append(
            f"“{_LEAK.strip()}”: weight decay and momentum reach every weight, as in the first implementation, so "
            "that a checkpoint has to hold every weight."
        )
    for cell in {cell.task: cell for cell in cells}.values():
        notes.append(f"{cell.task}: {metric_title(cell.metric)}; {data_text(cell)}.")
    for cell in cells:
        lost = [str(seed) for seed, score in cell.scores.items() if score is None]
        if lost:
            notes.append(
                f"{cell.task} {cell.method} {cell.setting}: diverged and not counted: seed {', '.join(lost)}."
            )
    return notes
