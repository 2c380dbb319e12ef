"""Which columns of a user's table are the text and the label, and what is asked of the model: said, or guessed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.errors import DataError, ParamsError, unknown
from pipeline.tasks.custom import CLASS, FILE, Own
from pipeline.tasks.raw import RawSplit

OBJECTIVES = ("classification", "regression", "completion")
_LABELS = (
    "label", "labels", "target", "class", "category", "sentiment", "stars", "rating", "score", "y", "verdict",
    "intent", "topic", "gold_label", "answer", "similarity",
)  # fmt: skip
_TEXTS = (
    "text", "sentence", "content", "review", "body", "comment", "message", "tweet", "snippet", "document",
    "description", "question", "query", "utterance", "headline", "title", "input",
)  # fmt: skip
_PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
    ("text1", "text2"), ("text_a", "text_b"), ("query", "passage"), ("query", "document"), ("context", "question"),
    ("s1", "s2"),
)  # fmt: skip
_COMPLETIONS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("input", "output"))
_FEW = 20  # different whole numbers that still look like classes
_LOOK = 5000  # rows that a guess looks at
_OTHERWISE = "--text, --label and --objective say otherwise"


@dataclass(frozen=True)
class Choice:
    """What a table is used for.

    Attributes:
        kind: ``text``, ``image`` or ``causal``.
        objective: one of ``OBJECTIVES``.
        text: the text columns; none for images.
        label: the label column; the completion.
        said: what was guessed, in a sentence; empty where all was given.
    """

    kind: str
    objective: str
    text: tuple[str, ...]
    label: str
    said: str = ""


def choose(own: Own, text: Sequence[str], label: str | None, objective: str | None) -> Choice:
    """Settle columns and objective; what is not given is known of a published data set, or guessed.

    Args:
        own: the data.
        text: text columns as given.
        label: the label column as given.
        objective: as given.

    Returns:
        The choice.

    Raises:
        ParamsError: if the objective is unknown, or too many columns are given.
        DataError: if a column is missing, or cannot be told from others.
    """
    if objective is not None and objective not in OBJECTIVES:
        raise ParamsError(f"--objective: unknown {unknown(objective, OBJECTIVES)}")
    if len(text) > 2:
        raise ParamsError(f"--text: {len(text)} columns; expected one, or two for pairs of texts")
    train = own.splits["train"]
    if own.pictures:
        if text or label:
            raise ParamsError("--text and --label: images by folder have no columns; leave them out")
        return Choice("image", objective or "classification", (), CLASS)
    there = train.table.column_names
    for key, name in [*(("--text", name) for name in text), *([("--label", label)] if label else [])]:
        if name not in there:
            raise DataError(f"{train.where}: {key}: no column {unknown(name, there)}")
    if label in text:
        raise ParamsError(f"--label: '{label}' is a text column, too; expected another one")
    if objective == "completion" or (objective is None and not text and not label):
        found = _completion(train, there, text, label, forced=objective == "completion")
        if found is not None:
            return found
    known = own.published
    picture = picture_column(train.table)
    guessed = label is None
    label = label or (known.label if known else _label(train, there, text))
    if not text and picture is not None and not (known and known.text):
        return Choice("image", objective or "classification", (), label, "")
    said = [f"label '{label}'"] if guessed else []
    if not text:
        text = known.text if known else _text(train, [name for name in there if name != label])
        said.insert(0, " and ".join(f"text '{name}'" for name in text))
    if objective is None:
        objective, why = _objective(train, label)
        said.append(f"{objective}, {why}")
    sentence = f"guessed: {', '.join(said)} ({_OTHERWISE})" if said else ""
    return Choice("text", objective, tuple(text), label, sentence)


def picture_column(table: pa.Table) -> str | None:
    """Find a column of encoded images.

    Returns:
        Its name; None where there is none.
    """
    for field in table.schema:
        struct = pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        if struct or pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
            return str(field.name)
    return FILE if table.column_names == [FILE, CLASS] else None


def values_in(split: RawSplit, name: str, limit: int | None = None) -> list[Any]:
    """The values of a column as Python has them, blank texts as None.

    Returns:
        [rows], or the first ``limit`` of them.

    Raises:
        DataError: if there is no such column.
    """
    if name not in split.table.column_names:
        raise DataError(f"{split.where}: no column {unknown(name, split.table.column_names)}")
    column = split.table.column(name)
    column = column if limit is None else column.slice(0, limit)
    return [None if isinstance(v, str) and not v.strip() else v for v in column.to_pylist()]


def as_number(value: Any) -> float | None:
    """Read a value as a finite number.

    Returns:
        The number; None for what is none, booleans included.
    """
    if value is None or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if number == number and abs(number) != float("inf") else None


def _completion(
    train: RawSplit, there: list[str], text: Sequence[str], label: str | None, *, forced: bool
) -> Choice | None:
    if text and label:
        if len(text) > 1:
            raise ParamsError("--text: two columns; a completion has one prompt")
        return Choice("causal", "completion", (text[0],), label)
    lower = {name.lower(): name for name in there}
    for prompt, completion in _COMPLETIONS:
        if prompt in lower and completion in lower:
            pair = lower[prompt], lower[completion]
            said = f"guessed: prompt '{pair[0]}', completion '{pair[1]}' ({_OTHERWISE})"
            return Choice("causal", "completion", (pair[0],), pair[1], said)
    if forced:
        raise DataError(
            f"{train.where}: no columns 'prompt' and 'completion'; name them with --text and --label, the columns "
            f"are {', '.join(there)}"
        )
    return None


def _label(train: RawSplit, there: list[str], text: Sequence[str]) -> str:
    lower = {name.lower().strip(): name for name in there if name not in text}
    for name in _LABELS:
        if name in lower:
            return lower[name]
    few = {}
    for name in lower.values():
        values = [
            v for v in values_in(train, name, _LOOK) if v is not None and not isinstance(v, (dict, list, bytes))
        ]
        distinct = len(set(values))
        if 2 <= distinct <= max(2, min(100, len(values) // 2)):
            few[name] = distinct
    if len(few) == 1:
        return next(iter(few))
    what = f"it could be {', '.join(few)}" if few else f"the columns are {', '.join(there)}"
    raise DataError(f"{train.where}: cannot tell which column is the label; {what}: add --label NAME")


def _text(train: RawSplit, there: list[str]) -> tuple[str, ...]:
    lower = {name.lower().strip(): name for name in there}
    for one, two in _PAIRS:
        if one in lower and two in lower:
            return lower[one], lower[two]
    known = [lower[name] for name in _TEXTS if name in lower]
    if known:
        return (known[0],)
    words = {}
    for name in there:
        values = [v for v in values_in(train, name, _LOOK) if isinstance(v, str)]
        if values and sum(as_number(v) is None for v in values) > len(values) // 2:
            words[name] = sum(len(re.findall(r"\w+", v)) for v in values) / len(values)
    longest = max(words, key=lambda name: words[name], default=None)
    if longest is None:
        raise DataError(f"{train.where}: no column of texts; the columns are {', '.join(there)}: add --text NAME")
    rivals = [name for name in words if name != longest and words[name] > words[longest] / 2 and words[name] >= 2]
    if rivals:
        raise DataError(
            f"{train.where}: cannot tell which column is the text; it could be {', '.join([longest, *rivals])}: "
            "add --text NAME (twice for pairs of texts)"
        )
    return (longest,)


def _objective(train: RawSplit, label: str) -> tuple[str, str]:
    if train.class_names(label):
        return "classification", f"as '{label}' names its classes"
    values = [v for v in values_in(train, label) if v is not None]
    numbers = [as_number(v) for v in values]
    distinct = len(set(map(str, values)))
    if not values or any(number is None for number in numbers):
        return "classification", f"as '{label}' holds {distinct} different texts"
    if any(number != int(number) for number in numbers if number is not None):
        return "regression", f"as '{label}' holds decimal numbers"
    if distinct <= _FEW and (distinct <= 2 or distinct <= len(values) // 2):
        return "classification", f"as '{label}' holds {distinct} different whole numbers"
    return "regression", f"as '{label}' holds {distinct} different whole numbers"
