"""Rows that can be trained on: cleaned, classes numbered, validation held out where there is none; all told."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import DataError
from pipeline.tasks.custom import Own
from pipeline.tasks.draws import permutation
from pipeline.tasks.raw import RawSplit
from pipeline.tasks.store import write_split
from pipeline.tuning.columns import Choice, as_number, values_in
from pipeline.tuning.pictures import Frame, pictures_of

HELD_OUT, MOST_HELD_OUT = 0.2, 2000
"""The share of train that is held out where no validation is given, and the most rows of it."""
LABEL, IMAGE = "label", "image"
_IMBALANCE = 0.8  # share of the commonest class from which on accuracy says little
_LONGEST = 40  # characters of a value that are shown
_MISSING = {"na", "n/a", "nan", "none", "null", "-", "?", "#n/a"}  # what files write for a value that is not there
_CLASSES = 100  # more of them than this, and than half the rows, are no classes


@dataclass
class Rows:
    """The rows of one split that are left.

    Attributes:
        inputs: each row's texts; of images, their one encoded file.
        labels: class names, numbers, or completions.
        where: the file, for messages.
    """

    inputs: list[tuple[Any, ...]]
    labels: list[Any]
    where: str

    def take(self, rows: list[int]) -> "Rows":
        """Keep some rows, in that order."""
        return Rows([self.inputs[i] for i in rows], [self.labels[i] for i in rows], self.where)


def prepare(own: Own, choice: Choice, frame: Frame | None, folder: Path, told: list[str]) -> list[str] | None:
    """Clean a user's rows and write them as ``train.parquet`` and ``validation.parquet``.

    Rows without a text or label are dropped. Where there is no validation, a fifth of train (2,000 rows at most)
    is held out: of every class alike, rows of equal text on one side, drawn with seed 0, so that runs of other
    seeds are judged on the same rows.

    Args:
        own: the data.
        choice: its columns and objective.
        frame: the size and channels of images.
        folder: where to write, an existing folder.
        told: takes a sentence for each thing worth knowing.

    Returns:
        The class names in label order; None where labels are no classes. A DataError if nothing is left, or labels
        do not fit the objective.
    """
    splits = {
        split: _complete(split, raw, choice, frame, told if split == "train" or len(own.splits) > 1 else [])
        for split, raw in own.splits.items()
    }
    classes = _classes(splits, choice, own)
    if classes is not None and choice.text:
        _tell_odd_classes(splits["train"], choice, told)
    if "validation" not in splits:
        splits = _held_out(splits["train"], choice, told)
    else:
        _tell_duplicates(splits, told)
    if classes is not None:
        _tell_balance(splits["train"], told)
    for split, rows in splits.items():
        write_split(folder, split, _table(rows, choice, classes), metadata=_names(choice, classes))
    return classes


def _complete(split: str, raw: RawSplit, choice: Choice, frame: Frame | None, told: list[str]) -> Rows:
    """The rows of a split that lack nothing."""
    labels = values_in(raw, choice.label)
    names = raw.class_names(choice.label)
    if choice.kind == "image":
        assert frame is not None
        inputs = [(picture,) for picture in pictures_of(raw, frame)]
    else:
        columns = [[v if v is None else str(v) for v in values_in(raw, name)] for name in choice.text]
        inputs = list(zip(*columns, strict=True))
    keep, lost = [], Counter[str]()
    first = 0
    for row, (label, parts) in enumerate(zip(labels, inputs, strict=True)):
        lacking = [name for name, part in zip(choice.text or ("image",), parts, strict=True) if part is None]
        label = _label(label, choice, names)
        if label is None:
            lacking.append(choice.label)
        if lacking:
            first = first if lost else row
            lost.update(lacking[:1])
        else:
            keep.append(row)
            labels[row] = label
    if lost:
        which = ", ".join(f"{count} without '{name}'" for name, count in lost.items())
        told.append(
            f"{split}: dropped {sum(lost.values())} of {len(labels)} rows: {which} (the first is row {first}, "
            "counted from 0)"
        )
    if not keep and choice.objective == "regression" and any(label is not None for label in labels):
        raise DataError(
            f"{raw.where}: column '{choice.label}' holds no numbers; regression needs them, with a decimal point"
        )
    if not keep:
        raise DataError(f"{raw.where}: no row has both its text and '{choice.label}'; is it the right column?")
    return Rows(inputs, labels, raw.where).take(keep)


def _label(value: Any, choice: Choice, names: list[str]) -> Any:
    """A label as it is used; None where it is missing."""
    if value is None:
        return None
    if choice.objective == "regression":
        return as_number(value)
    if choice.objective == "completion":
        return str(value)
    if names and isinstance(value, int) and not isinstance(value, bool):
        return names[value] if 0 <= value < len(names) else None
    if isinstance(value, float):
        return None if value != value else str(int(value)) if value == int(value) else str(value)
    return str(value).strip() if not isinstance(value, bool) else str(value).lower()


def _classes(splits: dict[str, Rows], choice: Choice, own: Own) -> list[str] | None:
    if choice.objective != "classification":
        return None
    train = splits["train"]
    known = own.splits["train"].class_names(choice.label)
    published = own.published.classes if own.published else ()
    if not known and published and set(train.labels) <= set(map(str, range(len(published)))):
        known = list(published)
        for rows in splits.values():
            rows.labels = [known[int(label)] for label in rows.labels]
    names = [name for name in known if name in set(train.labels)] or sorted(set(train.labels), key=_in_order)
    what = f"{train.where}: column '{choice.label}'" if choice.text else f"{train.where}"
    if len(names) < 2:
        raise DataError(f"{what} holds '{_short(names[0])}' only; expected two or more classes")
    if len(names) > max(_CLASSES, len(train.labels) // 2):
        raise DataError(
            f"{what} holds {len(names)} different values in {len(train.labels)} rows; expected class names: name "
            "another column with --label, or add --objective regression or completion"
        )
    for split, rows in splits.items():
        strange = next((label for label in rows.labels if label not in names), None)
        if strange is not None:
            raise DataError(
                f"{rows.where}: label '{_short(strange)}' of {split} does not occur in train; expected one of "
                f"{', '.join(map(_short, names[:10]))}"
            )
    return names


def _short(text: Any) -> str:
    """A value in a message of one line."""
    line = " ".join(str(text).split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"


def _in_order(name: str) -> tuple[bool, float, str]:
    """Numbers by size, then texts."""
    number = as_number(name)
    return number is None, number or 0.0, name


def _held_out(train: Rows, choice: Choice, told: list[str]) -> dict[str, Rows]:
    """Split train in two, of every class alike."""
    share = min(HELD_OUT, MOST_HELD_OUT / len(train.labels))
    groups: dict[tuple[Any, ...], list[int]] = {}
    for row, parts in enumerate(train.inputs):
        groups.setdefault(parts, []).append(row)
    classes: dict[Any, list[list[int]]] = {}
    strata = _strata(train.labels, choice)
    for rows in groups.values():
        classes.setdefault(strata[rows[0]], []).append(rows)
    held: list[int] = []
    largest = max(classes, key=lambda name: len(classes[name]))
    for number, name in enumerate(sorted(classes, key=str)):
        members = classes[name]
        wanted = max(round(share * sum(map(len, members))), 1 if name == largest else 0)
        taken = 0
        for group in permutation(len(members), 0, number)[: len(members) - 1]:
            if taken >= wanted:
                break
            held += members[group]
            taken += len(members[group])
    if not held:
        raise DataError(
            f"{train.where}: {len(train.labels)} rows are too few to hold some out; add rows, or give --validation"
        )
    out = set(held)
    alike = "of every class alike, " if choice.objective == "classification" else ""
    told.append(f"held out {len(held)} of {len(train.labels)} rows as validation ({alike}drawn with seed 0)")
    rest = [row for row in range(len(train.labels)) if row not in out]
    return {"train": train.take(rest), "validation": train.take(sorted(held))}


def _strata(labels: list[Any], choice: Choice) -> list[Any]:
    """What rows are to be alike in: the class, the fifth of the numbers, or nothing."""
    if choice.objective == "classification":
        return labels
    if choice.objective == "regression":
        edges = np.quantile(np.array(labels, dtype=np.float64), [0.2, 0.4, 0.6, 0.8])
        return [int(place) for place in np.searchsorted(edges, labels)]
    return [0] * len(labels)


def _tell_duplicates(splits: dict[str, Rows], told: list[str]) -> None:
    seen = set(splits["train"].inputs)
    both = sum(parts in seen for parts in splits["validation"].inputs)
    if both:
        told.append(
            f"warning: {both} of {len(splits['validation'].inputs)} rows of validation stand in train, too; "
            "scores will look better than they are"
        )


def _tell_odd_classes(train: Rows, choice: Choice, told: list[str]) -> None:
    """Say what looks like a value that is not there, or like a header that is none."""
    for name, count in Counter(train.labels).items():
        if str(name).lower() in _MISSING:
            told.append(
                f"warning: '{name}' is taken for a class of '{choice.label}' ({count} rows); leave cells empty "
                "that hold no class"
            )
    if choice.label in set(train.labels):
        told.append(
            f"warning: column '{choice.label}' holds '{choice.label}' as a value, too; does {train.where} lack a "
            "header line?"
        )


def _tell_balance(train: Rows, told: list[str]) -> None:
    counts = Counter(train.labels)
    (most, many), total = counts.most_common(1)[0], len(train.labels)
    rare, few = counts.most_common()[-1]
    if many / total >= _IMBALANCE:
        told.append(
            f"warning: {many / total:.0%} of train is class '{most}' (rarest: '{rare}', {few} rows): answering "
            f"'{most}' always scores {many / total:.2f} in accuracy; consider --metric f1 or matthews"
        )


def _table(rows: Rows, choice: Choice, classes: list[str] | None) -> pa.Table:
    if choice.kind == "image":
        columns: dict[str, Any] = {IMAGE: pa.array([parts[0] for parts in rows.inputs], pa.binary())}
        label = LABEL
    else:
        columns = {
            name: pa.array([parts[i] for parts in rows.inputs], pa.string()) for i, name in enumerate(choice.text)
        }
        label = choice.label
    if classes is not None:
        numbers = {name: number for number, name in enumerate(classes)}
        columns[label] = pa.array([numbers[name] for name in rows.labels], pa.int64())
    elif choice.objective == "regression":
        columns[label] = pa.array(rows.labels, pa.float64())
    else:
        columns[label] = pa.array(rows.labels, pa.string())
    return pa.table(columns)


def _names(choice: Choice, classes: list[str] | None) -> dict[str, str] | None:
    """The class names as ``datasets`` writes them into a parquet file."""
    if classes is None:
        return None
    label = LABEL if choice.kind == "image" else choice.label
    return {"huggingface": json.dumps({"info": {"features": {label: {"names": classes, "_type": "ClassLabel"}}}})}
