"""The report: tables, figures and one page that holds them all and needs no network.

The same metrics give the same bytes: no time, no path, no machine in it. A further experiment is a further
function from the results to a ``Section`` in ``_SECTIONS``.
"""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import StorageError
from pipeline.files import write_bytes
from pipeline.reports import checkpoints, distributed, figures, tables
from pipeline.reports.average import average_table
from pipeline.reports.drawing import Figure
from pipeline.reports.figure2 import cross_figure
from pipeline.reports.forgetting import forgetting_table, overlap_table
from pipeline.reports.notes import data_text
from pipeline.reports.rates import rate_table
from pipeline.reports.reading import load_results
from pipeline.reports.reference import reference_table
from pipeline.reports.results import Results
from pipeline.reports.table import Table, metric_title, percent, scale_of, score_text, signed, size


@dataclass(frozen=True)
class Section:
    """One part of the page: an experiment with its figures and tables.

    Attributes:
        name: its anchor.
        title: its heading.
        text: what the reader is looking at, in a sentence or two.
        figures: shown first.
        tables: shown below.
    """

    name: str
    title: str
    text: str
    figures: Sequence[Figure]
    tables: Sequence[Table]


def write_report(
    metrics_dir: Path | str,
    out_dir: Path | str,
    profile: str,
    only: Collection[tuple[str, str, str]] | None = None,
    chains: Collection[tuple[str, str, str]] | None = None,
    shares: Collection[tuple[str, str, str]] | None = None,
) -> list[Path]:
    """Write ``index.html``, ``tables/*.csv``, ``tables/*.md`` and ``figures/*.svg``.

    Args:
        metrics_dir: the folder ``metrics/`` of the project.
        out_dir: the folder to write to; made if it is not there.
        profile: the profile's name, for the heading.
        only: the cells wanted, see ``load_results``.
        chains: the same of the checkpoint stage.
        shares: the same of the distribute stage.

    Returns:
        The files, the page first.

    Raises:
        StorageError: if the folder cannot be written.
    """
    results, out = load_results(Path(metrics_dir), only, chains, shares), Path(out_dir)
    sections = [section for make in _SECTIONS if (section := make(results)) is not None]
    texts = {"index.html": render_page(results, sections, profile)}
    for section in sections:
        texts |= {f"figures/{figure.name}.svg": figure.svg for figure in section.figures}
        texts |= {f"tables/{table.name}.csv": table.csv() for table in section.tables}
        texts |= {f"tables/{table.name}.md": table.markdown() for table in section.tables}
    try:
        for folder in {(out / name).parent for name in texts}:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{out}: cannot make the report's folder: {error.strerror}") from None
    for name, text in texts.items():
        write_bytes(out / name, text.encode())
    return [out / name for name in texts]


def render_page(results: Results, sections: Sequence[Section], profile: str) -> str:
    """Fill the template; every text is escaped, only the svg of our own figures goes in as it is.

    Args:
        results: what was measured.
        sections: the experiments to show.
        profile: the profile's name.

    Returns:
        One self-contained HTML document.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    cells = results.cells.values()
    first = {task: next(cell for cell in cells if cell.task == task) for task in results.tasks}
    return environment.get_template("page.html").render(
        profile=profile,
        summary=summary(results),
        sections=sections,
        seeds=sorted({seed for cell in cells for seed in cell.scores}),
        data=[(task, data_text(cell), cell.data.get("digest", "")) for task, cell in first.items()],
        masks=[
            ("-".join(key), seed, digest)
            for key, mask in sorted(results.masks.items())
            for seed, digest in mask.digests.items()
        ],
        records=[
            (stage, name, json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False))
            for stage, contents in results.records.items()
            for name, content in contents.items()
        ],
        commands=(
            (f"fishmask profile use {profile}", "params.yaml of this profile"),
            ("fishmask repro", "every stage whose inputs changed, then this page"),
            ("fishmask ui", "the runs behind it: curves, settings, digests"),
            ("dvc metrics diff", "what changed since the last commit"),
        ),
    )


def summary(results: Results) -> list[str]:
    """One or two sentences per task, from the numbers.

    Args:
        results: what was measured.

    Returns:
        For each task what fish trains, reaches and weighs, and how it compares with dense and with random masks.
    """
    return [_summary(results, task) for task in results.tasks] or [
        "Nothing was trained yet: there are no metrics."
    ]


def _summary(results: Results, task: str) -> str:
    fish = results.main(task, "fish")
    if fish is None or not fish.values:
        scored = sum(bool(cell.values) for cell in results.cells.values() if cell.task == task)
        return f"On {task} fish has no score yet; cells that have one: {scored}."
    count = len(fish.values)
    trained = "" if fish.density is None else f" trains {percent(fish.density)} of the parameters and"
    text = f"On {task} ({metric_title(fish.metric)}) fish{trained} reaches {score_text(fish)}"
    text += f" (mean ± SD over {count} seed{'s' * (count != 1)})"
    for other, name in (("dense", "training all parameters"), ("random", "random masks of the same size")):
        cell = results.main(task, other)
        if cell is not None and cell.values:
            text += f", {name} {score_text(cell)}" + _compared(results, task, other)
    text += "."
    if fish.delta_bytes and fish.dense_bytes:
        share = fish.dense_bytes / fish.delta_bytes
        text += f" Its artifact takes {size(fish.delta_bytes)}, a dense checkpoint {size(fish.dense_bytes)}"
        text += f" ({share:,.0f} times as much)." if share >= 1.5 else "."
    return text


def _compared(results: Results, task: str, other: str) -> str:
    difference = results.difference(task, "fish", other)
    if difference is None or difference.mean is None or difference.interval is None:
        return ""
    scale = scale_of(results.cells[task, "fish", "main"].metric)
    low, high = (signed(end * scale) for end in difference.interval)
    told = "" if difference.sign else ", not told apart"
    return f" (fish {signed(difference.mean * scale)}, 95 % interval {low} to {high}{told})"


def _main_section(results: Results) -> Section | None:
    made = [tables.overview_table(results), average_table(results), tables.main_table(results)]
    made += [tables.difference_table(results), rate_table(results)]
    figure = figures.methods_figure(results)
    text = "Each method trains its own mask with its own tuned learning rate, on the same seeds and data order."
    return _section("main", "Main result", text, [figure], made) if results.cells else None


def _sweep_section(results: Results) -> Section | None:
    axes = ("density", "examples")
    text = (
        "The main setting with one quantity changed: how many parameters are trained, and how many examples the "
        "scores come from. The dashed line and band are dense training."
    )
    return _section(
        "sweeps",
        "Density and examples",
        text,
        [cross_figure(results), *(figures.sweep_figure(results, axis) for axis in axes)],
        [tables.sweep_table(results, axis) for axis in axes],
    )


def _mask_section(results: Results) -> Section | None:
    text = (
        "Which layers the chosen coordinates lie in, at the main setting, mean over seeds; the first row is where "
        "all parameters lie. Below, what a mask costs on disk."
    )
    shown = [figures.layout_figure(results, task) for task in results.tasks]
    return _section("masks", "Masks", text, shown, [tables.mask_table(results), overlap_table(results)])


def _forgetting_section(results: Results) -> Section | None:
    text = (
        "What training on one task costs the features that the other tasks read, and how far it moves the model."
    )
    return _section("forgetting", "Forgetting", text, [], [forgetting_table(results)])


def _checkpoint_section(results: Results) -> Section | None:
    text = (
        "Training with a chain of checkpoints, one step an epoch, against dense checkpoints; the mask fixed, or "
        "chosen anew as training goes on. Where weight decay reaches frozen weights, no checkpoint is sparse."
    )
    shown, listed = checkpoints.decay_figure(results), checkpoints.checkpoint_table(results)
    logged = reference_table("4") if listed else None
    return _section("checkpoints", "Checkpoints", text, [shown], [listed, logged])


def _share_section(results: Results) -> Section | None:
    text = (
        "Workers train side by side and merge after some local steps; they exchange only the coordinates of their "
        "masks, and every byte is counted where it is handed over."
    )
    shown = [distributed.bytes_figure(results), distributed.steps_figure(results)]
    listed: list[Table | None] = []
    for kind, number in distributed.NUMBERS.items():
        table = distributed.share_table(results, kind)
        listed += [table, reference_table(number, results.share_tasks) if table else None]
    return _section("distributed", "Distributed training", text, shown, listed)


def _detail_section(results: Results) -> Section | None:
    text = "Every trained cell, and how the score develops over the epochs at the main setting."
    return _section("cells", "Every cell", text, [figures.curves_figure(results)], [tables.all_table(results)])


def _section(
    name: str, title: str, text: str, drawn: Sequence[Figure | None], made: Sequence[Table | None]
) -> Section | None:
    """A section of what there is; None where there is nothing."""
    shown, listed = [f for f in drawn if f is not None], [t for t in made if t is not None]
    return Section(name, title, text, shown, listed) if shown or listed else None


_SECTIONS: tuple[Callable[[Results], Section | None], ...] = (
    _main_section,
    _sweep_section,
    _mask_section,
    _forgetting_section,
    _share_section,
    _checkpoint_section,
    _detail_section,
)
