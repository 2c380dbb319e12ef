"""What a model answers, as columns: a class with its probabilities, a number, or a text.

Shape legend: N rows, C classes.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from pipeline.tasks.draws import Rows

PREDICTION = "prediction"
PROBABILITY = "p_"


def columns_of(classes: Sequence[str] | None) -> list[str]:
    """Name the columns of the answers to a classification, or of any other answers.

    Returns:
        ``prediction``, and ``p_<class>`` for every class.
    """
    return [PREDICTION, *(PROBABILITY + name for name in classes or ())]


def class_answers(logits_NC: np.ndarray, classes: Sequence[str]) -> dict[str, pa.Array]:
    """Turn logits into the likeliest class and the probability of each, p(y|x) = softmax(z)_y in float32.

    Of equal logits the first class wins.

    Returns:
        ``prediction`` (string [N]) and ``p_<class>`` (float32 [N]) in the order of the classes.
    """
    shifted_NC = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True), dtype=np.float32)
    p_NC = shifted_NC / shifted_NC.sum(axis=1, keepdims=True)
    names = np.asarray(classes, dtype=object)[logits_NC.argmax(axis=1)]
    columns = [pa.array(names.tolist(), pa.string())]
    columns += [pa.array(p_NC[:, number]) for number in range(p_NC.shape[1])]
    return dict(zip(columns_of(classes), columns, strict=True))


def number_answers(outputs_N: np.ndarray) -> dict[str, pa.Array]:
    """Turn the outputs of a regression into a column.

    Returns:
        ``prediction`` (float32 [N]).
    """
    return {PREDICTION: pa.array(np.asarray(outputs_N, dtype=np.float32).reshape(-1))}


def spread(answers: Mapping[str, pa.Array], rows: Rows, total: int) -> dict[str, pa.Array]:
    """Put answers in the places of the rows that were asked; the others are null.

    Args:
        answers: column -> [N].
        rows: ascending places of the N rows.
        total: rows of the result.

    Returns:
        column -> [total].
    """
    if len(rows) == total:
        return dict(answers)
    place = np.full(total, -1, dtype=np.int64)
    place[rows] = np.arange(len(rows))
    at = pa.array(place, mask=place < 0)
    return {name: column.take(at) for name, column in answers.items()}
