"""How each method's learning rate was found: what `fishmask tune-lr` tried, on a split of train."""

from pipeline.reports.results import Results, method_order
from pipeline.reports.statistics import mean
from pipeline.reports.table import MISSING, Entry, Table, metric_title, scale_of


def rate_table(results: Results) -> Table | None:
    """The best rate of each task and method, and the scores of all that were tried.

    Args:
        results: with the records of ``tune-lr``.

    Returns:
        One row per task and method; None where no search is recorded for a task of these results.
    """
    rows, records, notes = [], [], []
    for _, content in sorted(results.records.get("tune-lr", {}).items()):
        task, setting = content["task"], content.get("setting", "main")
        if task not in results.tasks:
            continue
        scale = scale_of(content["metric"])
        for method, found in sorted(content["methods"].items(), key=lambda item: method_order(item[0])):
            tried = {float(rate): scores for rate, scores in found["tried"].items()}
            shown = {rate: _text(tried[rate], scale) for rate in sorted(tried)}
            seeds = len(tried.get(found["best"], []))
            listed = ", ".join(f"{rate:g}: {text}" for rate, text in shown.items())
            rows.append((
                Entry(task), Entry(method), Entry(setting), Entry(f"{found['best']:g}"),
                Entry(shown.get(found["best"], MISSING)), Entry(str(seeds)), Entry(listed),
            ))  # fmt: skip
            records += [
                {
                    "task": task,
                    "method": method,
                    "setting": setting,
                    "lr": rate,
                    "best": rate == found["best"],
                    "metric": content["metric"],
                }
                | {"mean": _mean(scores), "seeds": len(scores)}
                for rate, scores in sorted(tried.items())
            ]
        parts = content.get("rows", {})
        notes.append(
            f"{task}, {setting}: {metric_title(content['metric'])}; trained on {parts.get('fit', 0):,} and scored "
            f"on {parts.get('tune', 0):,} rows of train; the reported split was not read."
        )
    columns = ("task", "method", "setting", "lr", "score on tune", "seeds", "tried")
    title = "Learning rates: the search on a split of train"
    return Table("rates", title, columns, tuple(rows), tuple(records), tuple(notes), words=3) if rows else None


def _mean(scores: list[float | None]) -> float | None:
    """The mean; None where a run diverged."""
    kept = [score for score in scores if score is not None]
    return mean(kept) if len(kept) == len(scores) else None


def _text(scores: list[float | None], scale: int) -> str:
    centre = _mean(scores)
    return "diverged" if centre is None else f"{centre * scale:.1f}" if scale == 100 else f"{centre * scale:.4g}"
