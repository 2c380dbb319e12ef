"""The rows that a model is asked before it is registered: a user's, or made up; they become its input example."""

import io
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from pipeline.serving.asked import Asked
from pipeline.serving.questions import IMAGE, columns_to_read, read_rows
from pipeline.tasks.raw import RawSplit
from pipeline.tuning.pictures import encoded_pictures

_ROWS = 3


def example_rows(asked: Mapping[str, Asked], source: str | None) -> RawSplit:
    """Take the first rows of a user's, or make some up.

    Args:
        asked: the deltas that will be asked.
        source: as ``read_rows`` takes it; None makes them up.

    Returns:
        A few rows.
    """
    if source is not None:
        rows = read_rows(source, [])
        return RawSplit(rows.table.slice(0, _ROWS), rows.where)
    columns: dict[str, Any] = {}
    for one in asked.values():
        if one.interface.image is not None:
            columns[IMAGE] = [_grey(), _grey()]
        for name in one.interface.text or ([] if one.interface.image else ["text"]):
            columns[name] = ["An example.", "Another example."]
    return RawSplit(pa.table(columns), "the example")


def as_request(rows: RawSplit, asked: Mapping[str, Asked]) -> pa.Table:
    """Bring rows into the form of a request.

    Args:
        rows: that every delta has answered.
        asked: the deltas.

    Returns:
        The columns that the deltas read, and no others; images encoded, in the column ``image``.
    """
    columns: dict[str, Any] = {}
    for one in asked.values():
        if one.interface.image is not None:
            columns[IMAGE] = pa.array(list(encoded_pictures(rows)), pa.binary())
        else:
            columns |= {name: rows.table.column(name) for name in columns_to_read(one.interface.text, rows)}
    return pa.table(columns)


def _grey() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "grey").save(buffer, "PNG")
    return buffer.getvalue()
