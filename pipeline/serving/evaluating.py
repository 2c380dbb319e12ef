"""`fishmask evaluate`: a file of rows with their labels in, scores out."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.errors import DataError, ParamsError, unknown
from pipeline.losses import losses_from
from pipeline.runtime.progress import ProgressLine
from pipeline.runtime.terminal import print_table
from pipeline.serving.predicting import opened, read, say, say_cut
from pipeline.serving.predictor import Predictor
from pipeline.serving.questions import Texts, columns_to_read
from pipeline.tasks import metrics
from pipeline.tasks.batches import by_length
from pipeline.tasks.custom import CLASS, FILE
from pipeline.tasks.draws import Rows
from pipeline.tasks.evaluation import evaluate as score_batches
from pipeline.tasks.raw import RawSplit
from pipeline.tasks.text import TextSplit
from pipeline.tuning.columns import as_number, values_in
from pipeline.tuning.interface import Interface

LABEL = "label"


def evaluate(
    deltas: Sequence[str],
    source: str,
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
    """  # noqa: DOC502 - raised by what it calls
    predictor = opened(deltas, source, base, text, options)
    rows = read(source)
    return [_evaluated(predictor.use(name), rows, label, metric) for name in predictor.names]


def _evaluated(predictor: Predictor, rows: RawSplit, label: str | None, metric: str | None) -> dict[str, Any]:
    name, asked = predictor.active, predictor.asked
    interface = asked.interface
    chosen = _metric(metric, interface)
    labels, kept = labels_of(rows, interface, label)
    left = RawSplit(rows.table.take(pa.array(kept)), rows.where)
    result: dict[str, Any] = {"delta": name, "digest": asked.delta.digest, "metric": chosen}
    with ProgressLine(f"evaluate {name}") as line:
        if interface.kind == "causal":
            count, scores = _completions(predictor, left, labels, chosen)
            return result | {"rows": count, "scores": scores}
        found = predictor.outputs(left, progress=line.update)
    for missing, count in found.missing.items():
        say(f"{rows.where}: {count:,} rows lack '{missing}': left out")
    say_cut(rows.where, found.cut)
    if not len(found.rows):
        raise DataError(f"{rows.where}: no row has both what the model reads and a label; expected at least one")
    truth = np.array(labels, dtype=np.int64 if interface.classes else np.float32)[found.rows]
    loss = losses_from(torch.from_numpy(found.values), torch.from_numpy(truth)).double().mean()
    scores = metrics.score(chosen, found.values, truth) | {"loss": float(loss)}
    result |= {"rows": len(found.rows), "scores": scores}
    return result | _by_class(found.values, truth, interface.classes)


def _completions(
    predictor: Predictor, rows: RawSplit, completions: Sequence[str], metric: str
) -> tuple[int, dict[str, float]]:
    """Score a language model on completions as training does: on their tokens, each given those before it.

    Returns:
        How many rows were complete, and the scores.

    Raises:
        DataError: if none was.
    """
    interface = predictor.asked.interface
    texts = Texts.of(rows, columns_to_read(interface.text, rows))
    for missing, count in texts.missing.items():
        say(f"{rows.where}: {count:,} rows lack '{missing}': left out")
    if not len(texts.rows):
        raise DataError(f"{rows.where}: no row has both a prompt and a completion; expected at least one")
    tokenizer, device = predictor.tokenizer(), predictor.device
    held = pa.array([completions[row] for row in texts.rows], pa.string())
    tokens = TextSplit(pa.table(tokenizer.completions(texts.columns[0], held)), None, tokenizer.settings["pad"])
    places = by_length(np.arange(len(texts.rows), dtype=np.int64), predictor.batch_size, tokens.lengths)
    batches = (tokens.batch(group, device.device) for group in places)
    return len(texts.rows), score_batches(predictor.model(), batches, metric, device.device, device.autocast)


def show(results: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Print scores: a table for people."""
    if as_json:
        print(json.dumps(results))
        return
    names = list(dict.fromkeys(name for result in results for name in result["scores"]))
    rows = []
    for result in results:
        values = [f"{result['scores'][name]:.4f}" if name in result["scores"] else "–" for name in names]
        rows.append((result["delta"], f"{result['rows']:,}", *values))
    print_table(("delta", "rows", *names), rows)
    if len(results) == 1 and "classes" in results[0]:
        by_class = [
            (row["name"], f"{row['rows']:,}", f"{row['precision']:.4f}", f"{row['recall']:.4f}")
            for row in results[0]["classes"]
        ]
        print_table(("class", "rows", "precision", "recall"), by_class)


def labels_of(rows: RawSplit, interface: Interface, label: str | None) -> tuple[list[Any], Rows]:
    """Read the labels of a table as the delta's classes, as numbers, or as completions.

    A class is told by its name. Where no label is a name, they are the places of the classes, from 0.

    Args:
        rows: the table.
        interface: of the delta.
        label: the column; None takes the one that the delta names, the folder of an image, or ``label``.

    Returns:
        Labels of the rows that have one, and those rows, ascending.

    Raises:
        DataError: if a label is none of the classes, or no number.
    """
    there = rows.table.column_names
    name = label or interface.label or (CLASS if CLASS in there and FILE in there else LABEL)
    if name not in there:
        raise DataError(f"{rows.where}: --label: no column {unknown(name, there)}")
    values = values_in(rows, name)
    kept = np.array([row for row, value in enumerate(values) if value is not None], dtype=np.int64)
    if len(kept) < len(values):
        say(f"{rows.where}: {len(values) - len(kept):,} of {len(values):,} rows lack '{name}': left out")
    held = [values[row] for row in kept]
    if interface.kind == "causal":
        return [str(value) for value in held], kept
    if interface.classes is None:
        numbers = [as_number(value) for value in held]
        if None in numbers:
            at = numbers.index(None)
            raise DataError(
                f"{rows.where}: '{held[at]}' in column '{name}', row {kept[at]} (rows count from 0), is no "
                "number; expected what the delta predicts"
            )
        return numbers, kept
    texts = [_text(value, rows.class_names(name)) for value in held]
    places = {known: number for number, known in enumerate(interface.classes)}
    if not any(text in places for text in texts):
        places = {str(number): number for number in range(len(places))}
    strange = next((at for at, text in enumerate(texts) if text not in places), None)
    if strange is not None:
        raise DataError(
            f"{rows.where}: label '{held[strange]}' in column '{name}', row {kept[strange]} (rows count from 0), "
            f"is no class of the delta; expected one of {', '.join(interface.classes[:10])}"
        )
    return [places[text] for text in texts], kept


def _text(value: Any, names: Sequence[str]) -> str:
    """A label as ``fishmask tune`` names its class."""
    if isinstance(value, bool):
        return str(value).lower()
    if names and isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _metric(wanted: str | None, interface: Interface) -> str:
    chosen = wanted or interface.metric or next(iter(metrics.OBJECTIVES[interface.objective]))
    if metrics.objective_of(chosen) != interface.objective:
        fitting = metrics.OBJECTIVES[interface.objective]
        raise ParamsError(f"--metric: '{chosen}' does not fit the delta; expected one of {', '.join(fitting)}")
    return chosen


def _by_class(outputs: np.ndarray, labels: np.ndarray, classes: Sequence[str] | None) -> dict[str, Any]:
    if not classes:
        return {}
    from sklearn.metrics import precision_recall_fscore_support

    precision, recall, _, rows = precision_recall_fscore_support(
        labels, outputs.argmax(axis=1), labels=np.arange(len(classes)), zero_division=0.0
    )
    columns = zip(classes, rows.tolist(), precision.tolist(), recall.tolist(), strict=True)
    return {"classes": [{"name": n, "rows": r, "precision": p, "recall": q} for n, r, p, q in columns]}
