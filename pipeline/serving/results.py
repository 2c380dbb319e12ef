"""Write a table of answers: csv, tsv, json, jsonl or parquet, whole or not at all."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ParamsError
from pipeline.files import write_bytes

FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


def check_format(path: Path) -> None:
    """Refuse a file whose name says no format, before any work.

    Raises:
        ParamsError: if its extension is none of ``FORMATS``.
    """
    if path.suffix.lower() not in FORMATS:
        raise ParamsError(f"{path}: unknown format '{path.suffix}'; expected {', '.join(FORMATS)}")


def write_table(path: Path, table: pa.Table) -> list[str]:
    """Write a table, atomically.

    Args:
        path: the file; its extension says the format.
        table: to be written; what a format cannot hold is left out.

    Returns:
        Names of the columns that were left out.
    """
    data, left_out = encoded(path.suffix.lower(), table)
    write_bytes(path, data)
    return left_out


def encoded(suffix: str, table: pa.Table) -> tuple[bytes, list[str]]:
    """Encode a table.

    In csv and tsv a null is an empty cell; numbers are the shortest that read back the same. In json a number that
    is not finite is null.

    Args:
        suffix: of ``FORMATS``.
        table: to be encoded.

    Returns:
        The bytes, and the names of columns that the format cannot hold.
    """
    buffer = io.BytesIO()
    if suffix == ".parquet":
        pq.write_table(table, buffer, compression="zstd")
        return buffer.getvalue(), []
    flat = suffix in {".csv", ".tsv"}
    left_out = [field.name for field in table.schema if _binary(field.type) or (flat and _nested(field.type))]
    table = table.drop_columns(left_out)
    if flat:
        text = io.StringIO()
        writer = csv.writer(text, delimiter="\t" if suffix == ".tsv" else ",", lineterminator="\n")
        writer.writerow(table.column_names)
        writer.writerows(zip(*(column.cast(pa.string()).to_pylist() for column in table.columns), strict=True))
        return text.getvalue().encode(), left_out
    rows = [_plain(row) for row in table.to_pylist()]
    if suffix == ".jsonl":
        return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode(), left_out
    return f"{json.dumps(rows, ensure_ascii=False, indent=1)}\n".encode(), left_out


def _binary(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(_binary(kind.field(number).type) for number in range(kind.num_fields))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _binary(kind.value_type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _nested(kind: pa.DataType) -> bool:
    return bool(pa.types.is_nested(kind))


def _plain(value: Any) -> Any:
    """What JSON knows: dates and the like as text, and no NaN."""
    if isinstance(value, dict):
        return {str(key): _plain(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(held) for held in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)
