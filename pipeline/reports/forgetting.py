"""What training on one task cost the others, how far it moved, and how masks overlap: `fishmask forget`."""

from collections.abc import Mapping
from typing import Any

from pipeline.reports.results import Results
from pipeline.reports.statistics import mean, spread
from pipeline.reports.table import Entry, Table, percent, scale_of, signed


def forgetting_table(results: Results) -> Table | None:
    """One row per method, trained task and judging task: the probe's score before and after, and the distance.

    Args:
        results: with the records of ``forget``.

    Returns:
        The table; None without a record.
    """
    rows, records = [], []
    for content in results.records.get("forget", {}).values():
        method, setting = content["method"], content["setting"]
        for task, seeds in content["tasks"].items():
            far = [record["distance"]["relative"] for record in seeds.values()]
            for other in sorted({name for record in seeds.values() for name in record} - {"distance"}):
                metric = content["metrics"][other]
                scale = scale_of(metric)
                before = [record[other]["before"] for record in seeds.values()]
                after = [record[other]["after"] for record in seeds.values()]
                change = [b - a for a, b in zip(before, after, strict=True)]
                rows.append((
                    Entry(f"{method} {setting}"), Entry(task), Entry(other), Entry(_shown(before, scale)),
                    Entry(_shown(after, scale)), Entry(signed((mean(change) or 0.0) * scale)),
                    Entry(percent(mean(far) or 0.0)), Entry(str(len(seeds))),
                ))  # fmt: skip
                records.append(
                    {"method": method, "setting": setting, "trained": task, "judged": other, "metric": metric}
                    | {"before": mean(before), "after": mean(after), "change": mean(change), "distance": mean(far)}
                    | {"seeds": len(seeds)}
                )
    columns = ("cell", "trained on", "judged on", "before", "after", "change", "distance", "seeds")
    notes = (
        "Judged by a head trained on the base with everything else frozen; before: on the base, after: on the "
        "model trained for the other task, the head unchanged. Validation rows of the judging task.",
        "Distance: |θ − θ₀| / |θ₀| of all parameters outside the head. Means over seeds.",
    )
    title = "Forgetting: what training on one task costs the features that another one reads"
    return Table("forgetting", title, columns, tuple(rows), tuple(records), notes, words=3) if rows else None


def overlap_table(results: Results) -> Table | None:
    """Jaccard indices of masks, between seeds of a task and between tasks; None without a record."""
    rows, records = [], []
    for content in results.records.get("forget", {}).values():
        cell = f"{content['method']} {content['setting']}"
        for kind, pairs in (("seeds", content["overlap"]["seeds"]), ("tasks", content["overlap"]["tasks"])):
            for name, values in sorted(pairs.items()):
                rows.append((
                    Entry(cell),
                    Entry(f"{kind} of {name}" if kind == "seeds" else name),
                    Entry(_mean(values)),
                ))
                records.append({
                    "cell": cell,
                    "between": kind,
                    "name": name,
                    "jaccard": mean(list(values.values())),
                })
    rows = [row for row in rows if row[2].text]
    notes = (
        "|A ∩ B| / |A ∪ B|, heads left out, mean over pairs of seeds or over seeds; two random masks of 0.5 % "
        "share 0.0025.",
    )
    title = "Overlap of masks between seeds and between tasks"
    columns = ("cell", "between", "Jaccard index")
    return Table("overlaps", title, columns, tuple(rows), tuple(records), notes) if rows else None


def _shown(values: list[float], scale: int) -> str:
    deviation = spread(values)
    centre = (mean(values) or 0.0) * scale
    return f"{centre:.1f}" + ("" if deviation is None else f" ± {deviation * scale:.1f}")


def _mean(values: Mapping[str, Any]) -> str:
    centre = mean(list(values.values()))
    return "" if centre is None else f"{centre:.4f}"
