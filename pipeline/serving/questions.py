"""The rows to be answered: which are complete, and what the model is given of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import DataError, unknown
from pipeline.tasks.columns import is_text
from pipeline.tasks.draws import Rows


@dataclass(frozen=True)
class Texts:
    """The texts of complete rows.

    Attributes:
        columns: one string array a column, of the complete rows only.
        rows: their places in the table, ascending.
        missing: column -> rows that lack a value there, where there are any.
    """

    columns: list[pa.Array]
    rows: Rows
    missing: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, table: pa.Table, names: Sequence[str], where: str) -> "Texts":
        """Take the texts of a table; a row counts as complete where every one of them holds more than blanks.

        Args:
            table: the rows.
            names: the columns to read.
            where: the file, for messages.

        Returns:
            The complete rows' texts.

        Raises:
            DataError: if a column is missing or holds something other than text.
        """  # noqa: DOC502 - raised by what it calls
        arrays, missing = [], {}
        complete = np.ones(table.num_rows, dtype=bool)
        for name in names:
            array = _texts(table, name, where)
            held = pc.fill_null(pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(array)), 0), False)
            held = held.to_numpy(zero_copy_only=False)
            if not held.all():
                missing[name] = int((~held).sum())
            complete &= held
            arrays.append(array)
        rows = np.flatnonzero(complete).astype(np.int64)
        return cls([array.take(pa.array(rows)) for array in arrays], rows, missing)


def _texts(table: pa.Table, name: str, where: str) -> pa.Array:
    if name not in table.column_names:
        raise DataError(f"{where}: no column {unknown(name, table.column_names)}")
    values = table.column(name).combine_chunks()
    values = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
    if pa.types.is_null(values.type):
        return values.cast(pa.string())
    if not is_text(values.type):
        raise DataError(f"{where}: column '{name}' holds {values.type}; expected text")
    return values.cast(pa.string())
