"""Pick the columns a task needs out of its raw splits, and check every value in them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import DataError, unknown
from pipeline.tasks.raw import RawSplit


def column(split: RawSplit, name: str, key: str) -> pa.Array:
    """A column of a split.

    Returns:
        Its values in one array; dictionary-encoded ones decoded.

    Raises:
        DataError: if there is no such column; names those there, and the closest.
    """
    there = split.table.column_names
    if name not in there:
        raise DataError(f"{split.where}: {key}: no column {unknown(name, there)}")
    values = split.table.column(name).combine_chunks()
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values


def text_column(split: RawSplit, name: str) -> pa.Array:
    """A column of texts.

    Returns:
        string array without nulls; blank texts are let through.

    Raises:
        DataError: if the column is missing, holds no text, or lacks values.
    """
    values = column(split, name, "data.text")
    if not is_text(values.type):
        raise DataError(f"{split.where}: column '{name}' (data.text) holds {values.type}; expected text")
    _complete(values, split, name)
    return values.cast(pa.string())


def is_text(kind: pa.DataType) -> bool:
    """Tell whether an Arrow type is text.

    Returns:
        True for string, large_string and string_view.
    """
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _complete(values: pa.Array, split: RawSplit, name: str) -> None:
    if values.null_count:
        row = pc.index(pc.is_null(values), True).as_py()
        raise DataError(
            f"{split.where}: column '{name}' lacks {values.null_count} of {len(values)} values, the first in row "
            f"{row} (rows count from 0); expected a value in every row"
        )


def encode_labels(
    splits: Mapping[str, RawSplit], name: str, classes: Sequence[str] = (), *, regression: bool | None = None
) -> tuple[dict[str, np.ndarray | None], list[str] | None]:
    """Read the labels of every split as classes 0..C-1, or as numbers to regress.

    Text (or true/false) becomes classes in sorted order, or in a known data set's own. Whole numbers are classes:
    where the data names its classes, each must be one of them; otherwise train must show every one of 0..C-1.
    Decimal numbers are regressed. A test split without the column, or with -1 everywhere, is unlabelled.

    Args:
        splits: the raw splits; train is there.
        name: the column.
        classes: names in label order, where known; of integer labels a file's own names win.
        regression: what the task's metric needs; None lets the column's type decide.

    Returns:
        Split -> int64 or float32 [rows], None for an unlabelled test split; and the class names or None.

    Raises:
        DataError: naming the file, the row and what was expected.
    """
    free = [split for split in splits if split.startswith("test") and "validation" in splits]  # need no labels
    values = {
        split: column(raw, name, "data.label")
        for split, raw in splits.items()
        if split not in free or name in raw.table.column_names
    }
    for split in [s for s in values if s in free]:
        if values[split].null_count == len(values[split]) or _all_minus_one(values[split]):
            del values[split]
    for split, array in values.items():
        _complete(array, splits[split], name)
    unlabelled: dict[str, np.ndarray | None] = {split: None for split in splits if split not in values}
    kinds = {split: _kind(array.type, splits[split], name) for split, array in values.items()}
    if len({kind == "text" for kind in kinds.values()}) > 1:
        odd = next(s for s in kinds if (kinds[s] == "text") != (kinds["train"] == "text"))
        raise DataError(
            f"{splits[odd].where}: column '{name}' (data.label) holds {values[odd].type}; "
            f"train holds {values['train'].type}, expected the same in every split"
        )
    if kinds["train"] == "text":
        if regression:
            raise DataError(f"{splits['train'].where}: column '{name}' holds text; the metric needs numbers")
        labels, names = _from_text(values, splits, name, classes)
        return {**labels, **unlabelled}, names
    arrays = {split: array.to_numpy(zero_copy_only=False) for split, array in values.items()}
    if regression or (regression is None and "decimal" in kinds.values()):
        for split, array in arrays.items():
            _reject(~np.isfinite(array.astype(np.float64)), array, splits[split], name, "a finite number")
        return {**{s: array.astype(np.float32) for s, array in arrays.items()}, **unlabelled}, None
    names = splits["train"].class_names(name) or list(classes)
    return {**_from_integers(arrays, splits, name, names), **unlabelled}, names or _count(arrays["train"])


def _kind(kind: pa.DataType, split: RawSplit, name: str) -> str:
    if is_text(kind) or pa.types.is_boolean(kind):
        return "text"
    if pa.types.is_integer(kind):
        return "whole"
    if pa.types.is_floating(kind):
        return "decimal"
    raise DataError(f"{split.where}: column '{name}' (data.label) holds {kind}; expected text or numbers")


def _all_minus_one(array: pa.Array) -> bool:
    numeric = pa.types.is_integer(array.type) or pa.types.is_floating(array.type)
    return bool(numeric and len(array) and pc.all(pc.equal(array, -1)).as_py())


def _reject(bad: np.ndarray, array: np.ndarray, split: RawSplit, name: str, expected: str) -> None:
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise DataError(
            f"{split.where}: label {array[row]} in column '{name}', row {row} (rows count from 0), is out of "
            f"range; expected {expected}"
        )


def _count(train: np.ndarray) -> list[str]:
    return [str(label) for label in range(int(train.max()) + 1)]


def _from_integers(
    arrays: Mapping[str, np.ndarray], splits: Mapping[str, RawSplit], name: str, names: list[str]
) -> dict[str, np.ndarray]:
    train = arrays["train"]
    if names:
        expected = f"classes 0..{len(names) - 1} ({', '.join(names[:10])}{', …' if len(names) > 10 else ''})"
    else:
        top = len(np.unique(train)) - 1
        expected = f"classes 0..{top}, as train holds {top + 1} distinct labels"
        if top < 1:
            raise DataError(
                f"{splits['train'].where}: column '{name}' holds one label only; expected two or more classes"
            )
    count = len(names) or len(np.unique(train))
    for split, array in arrays.items():
        _reject((array < 0) | (array >= count) | (array != np.floor(array)), array, splits[split], name, expected)
    return {split: array.astype(np.int64) for split, array in arrays.items()}


def _from_text(
    values: Mapping[str, pa.Array], splits: Mapping[str, RawSplit], name: str, classes: Sequence[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    texts: dict[str, list[Any]] = {}
    for split, array in values.items():
        texts[split] = array.cast(pa.string()).to_pylist()
        if "" in texts[split]:
            raise DataError(
                f"{splits[split].where}: column '{name}' is blank in row {texts[split].index('')} "
                "(rows count from 0); expected a class name in every row"
            )
    found = set(texts["train"])
    names = list(classes) if len(found) > 1 and found <= set(classes) else sorted(found)
    if len(names) < 2:
        raise DataError(
            f"{splits['train'].where}: column '{name}' holds '{names[0]}' only; expected two or more classes"
        )
    if len(names) > max(100, len(texts["train"]) // 2):
        raise DataError(
            f"{splits['train'].where}: column '{name}' (data.label) holds {len(names)} different texts in "
            f"{len(texts['train'])} rows; expected class names, is it the right column?"
        )
    numbers = {label: number for number, label in enumerate(names)}
    for split, labels in texts.items():
        for row, label in enumerate(labels):
            if label not in numbers:
                raise DataError(
                    f"{splits[split].where}: label '{label}' in column '{name}', row {row} (rows count from 0), "
                    f"does not occur in train; expected one of {', '.join(names[:10])}"
                )
    return {
        s: np.array([numbers[label] for label in labels], dtype=np.int64) for s, labels in texts.items()
    }, names
