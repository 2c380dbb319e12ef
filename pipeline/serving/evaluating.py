"""`fishmask evaluate`: a file of rows with their labels in, scores out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.errors import DataError, ParamsError
from pipeline.losses import losses_from
from pipeline.progress import ProgressLine
from pipeline.serving.interface import Interface
from pipeline.serving.predicting import opened, read_rows, say
from pipeline.tasks import metrics
from pipeline.tasks.columns import column
from pipeline.tasks.draws import Rows
from pipeline.tasks.raw import RawSplit

LABEL = "label"


def evaluate(
    deltas: Sequence[str],
    source: Path,
    *,
    base: str | None = None,
    text: Sequence[str] = (),
    label: str | None = None,
    metric: str | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Score deltas on the rows of a file; rows that lack a text or a label are left out, and said.

    Args:
        deltas: as ``parse_deltas`` takes them.
        source: the rows.
        base: the base's source, where it is another than the one that the deltas name.
        text: the columns to read, where a delta does not say.
        label: the column of labels, where a delta does not say.
        metric: one of ``metrics.METRICS``; None is what the delta was tuned by.
        options: of ``Predictor``.

    Returns:
        For each delta: ``delta`` (its name), ``digest``, ``rows``, ``metric`` (its name), ``scores`` (it, what is
        shown beside it, and the mean loss), and for classes, ``classes``: name, rows, precision and recall.

    Raises:
        DataError: if the rows cannot be read, or no row is complete.
    """
    predictor = opened(deltas, source, base, text, options)
    results = []
    for name in predictor.names:
        asked = predictor.use(name).asked
        named = [] if asked.interface.classes is None else [label or asked.interface.label or LABEL]
        table = read_rows(source, [*asked.interface.text, *named])
        labels, kept = labels_of(table, asked.interface, label, str(source))
        with ProgressLine(f"evaluate {name}") as line:
            texts, outputs, cut = predictor.outputs(
                table.take(pa.array(kept)), where=str(source), progress=line.update
            )
        for missing, count in texts.missing.items():
            say(f"{source}: {count:,} rows lack '{missing}': left out")
        if not len(texts.rows):
            raise DataError(f"{source}: no row has both a text and a label; expected at least one")
        chosen = _metric(metric, asked.interface)
        scores = _scores(chosen, outputs, labels[texts.rows])
        result = {
            "delta": name,
            "digest": asked.delta.digest,
            "rows": len(texts.rows),
            "cut": cut,
            "metric": chosen,
        }
        results.append(
            result | {"scores": scores} | _by_class(outputs, labels[texts.rows], asked.interface.classes)
        )
    return results


def show(results: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Print scores: a table for people."""
    if as_json:
        print(json.dumps(results))
        return
    console = Console(highlight=False)
    names = list(dict.fromkeys(name for result in results for name in result["scores"]))
    table = Table("delta", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("rows", *names):
        table.add_column(name, justify="right")
    for result in results:
        values = [f"{result['scores'][name]:.4f}" if name in result["scores"] else "–" for name in names]
        table.add_row(result["delta"], f"{result['rows']:,}", *values)
    console.print(table)
    if len(results) == 1 and "classes" in results[0]:
        by_class = Table("class", box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("rows", "precision", "recall"):
            by_class.add_column(name, justify="right")
        for row in results[0]["classes"]:
            by_class.add_row(row["name"], f"{row['rows']:,}", f"{row['precision']:.4f}", f"{row['recall']:.4f}")
        console.print(by_class)


def labels_of(table: pa.Table, interface: Interface, label: str | None, where: str) -> tuple[np.ndarray, Rows]:
    """Read the labels of a table as the delta's classes, or as numbers.

    A label is a class's name. Where none of them is, they are the places of the classes, from 0.

    Args:
        table: the rows.
        interface: of the delta.
        label: the column; None takes the one that the delta names, else ``label``.
        where: the file, for messages.

    Returns:
        int64 or float32 [N], and the rows that have one, ascending.

    Raises:
        DataError: if a label is none of the classes, or no number.
    """
    name = label or interface.label or LABEL
    values = column(RawSplit(table, where), name, "--label")
    held = [value if value != "" else None for value in values.to_pylist()]
    kept = np.array([row for row, value in enumerate(held) if value is not None], dtype=np.int64)
    if len(kept) < len(held):
        say(f"{where}: {len(held) - len(kept):,} of {len(held):,} rows lack '{name}': left out")
    found = [held[row] for row in kept]
    if interface.classes is None:
        if not (pa.types.is_floating(values.type) or pa.types.is_integer(values.type)):
            raise DataError(
                f"{where}: column '{name}' holds {values.type}; expected numbers, as the delta predicts"
            )
        return np.array(found, dtype=np.float32), kept
    numbers = {known: number for number, known in enumerate(interface.classes)}
    texts = [_text(value) for value in found]
    if not any(text in numbers for text in texts):
        numbers = {str(number): number for number in range(len(numbers))}
    labels = np.array([numbers.get(text, -1) for text in texts], dtype=np.int64)
    if (labels < 0).any():
        at = int(np.flatnonzero(labels < 0)[0])
        some = ", ".join(interface.classes[:10])
        raise DataError(
            f"{where}: label '{found[at]}' in column '{name}', row {kept[at]} (rows count from 0), is no class of "
            f"the delta; expected one of {some}"
        )
    return labels, kept


def _text(value: Any) -> str:
    """A label as a class is named: 1.0 of a column that also lacks some reads as 1."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _metric(wanted: str | None, interface: Interface) -> str:
    chosen = wanted or interface.metric or ("accuracy" if interface.classes else "pearson")
    if metrics.needs_regression(chosen) == bool(interface.classes):
        fitting = metrics.CLASSIFICATION if interface.classes else metrics.REGRESSION
        raise ParamsError(f"--metric: '{chosen}' does not fit the delta; expected one of {', '.join(fitting)}")
    return chosen


def _scores(metric: str, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    loss = losses_from(torch.from_numpy(outputs), torch.from_numpy(labels)).double().mean()
    return metrics.score(metric, outputs, labels) | {"loss": float(loss)}


def _by_class(outputs: np.ndarray, labels: np.ndarray, classes: Sequence[str] | None) -> dict[str, Any]:
    if not classes:
        return {}
    from sklearn.metrics import precision_recall_fscore_support

    precision, recall, _, rows = precision_recall_fscore_support(
        labels, outputs.argmax(axis=1), labels=np.arange(len(classes)), zero_division=0.0
    )
    columns = zip(classes, rows.tolist(), precision.tolist(), recall.tolist(), strict=True)
    return {"classes": [{"name": n, "rows": r, "precision": p, "recall": q} for n, r, p, q in columns]}
